"""XLA's flags: added once, before jax looks for devices, and never against the user's own."""

import pytest

from medfuse_jax.runtime import compilation


@pytest.mark.parametrize(
    ("given", "has_plugin", "expected"),
    [
        ("", True, compilation._GRAPHS),
        ("--xla_dump_to=a", True, f"--xla_dump_to=a {compilation._GRAPHS}"),
        (compilation._GRAPHS, True, compilation._GRAPHS),
        ("--xla_gpu_enable_command_buffer=", True, "--xla_gpu_enable_command_buffer="),
        ("--xla_dump_to=a", False, "--xla_dump_to=a"),
    ],
)
def test_cuda_graphs_are_asked_for_unless_the_user_decided(monkeypatch, given, has_plugin, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(compilation, "has_cuda_plugin", lambda: has_plugin)
    compilation.use_cuda_graphs()
    assert compilation.os.environ["XLA_FLAGS"] == expected
