"""XLA's flags, added once, before jax looks for devices, and never against the user's own; the cache's folder."""

import jax
import pytest

from medfuse_jax.runtime import compilation, files


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


def test_compiled_programs_go_to_the_users_cache_or_the_folder_given(monkeypatch):
    monkeypatch.setattr(compilation, "use_cuda_graphs", lambda: None)
    before = jax.config.jax_compilation_cache_dir
    try:
        for given, expected in ((None, str(files.cache_dir() / "xla")), ("/shared/compiled", "/shared/compiled")):
            jax.config.update("jax_compilation_cache_dir", given)
            compilation.configure()
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
