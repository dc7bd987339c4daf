"""BENCHMARKS.md is what the records under results/ make it, and refuses what is no record."""

import json
from pathlib import Path

import pytest

from medfuse_jax.bench import page
from medfuse_jax.errors import UserError

_ROOT = Path(__file__).parent.parent


def _row(**changes) -> dict:
    environment = {
        "platform": "cpu", "device": "cpu", "num_local_devices": 1, "cpu": "A CPU", "cores": 2, "python": "3.11",
        "jax": "0.10", "flax": "0.12", "numpy": "2.0", "commit": "abc", "load_average": 0.5,
    }  # fmt: skip
    row = {"case": "step medfuse B=16 19% paired 2 h float32", "contender": "torch_released", "seconds": 2.0}
    row |= {"seconds_min": 1.5, "seconds_max": 2.5, "samples_per_s": 8.0, "command": "python -m medfuse_jax.bench"}
    row |= {"time_over_ours": {"median": 3.25, "min": 3.1, "max": 3.5, "of_best": 3.3}, "environment": environment}
    return row | changes


def _write(folder: Path, *rows) -> Path:
    path = folder / "2026-01-01_cpu" / "bench.json"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_is_current():
    assert (_ROOT / "BENCHMARKS.md").read_text() == page.render(_ROOT / "results"), (
        "run python -m medfuse_jax.bench.page"
    )


def test_a_number_of_a_record_is_on_the_page(tmp_path):
    text = page.render(_write(tmp_path, _row()))
    assert (
        "3.25 (3.10-3.50; best 3.30)" in text
        and "8.0" in text
        and "A CPU" in text
        and "abc" in text
        and "reached" in text
    )


@pytest.mark.parametrize(("median", "verdict"), [(3.0, "reached"), (2.99, "**missed**")])
def test_a_target_is_reached_or_missed(tmp_path, median, verdict):
    text = page.render(
        _write(tmp_path, _row(time_over_ours={"median": median, "min": 1.0, "max": 4.0, "of_best": 2.0}))
    )
    assert f"| {verdict} |" in text


def test_every_target_names_a_case_of_a_preset():
    from medfuse_jax.bench import cases

    presets = {"cpu": ("cpu", "sweeps"), "gpu": ("h200",)}
    names = {platform: [c.name for p in held for c in cases.preset(p)[0]] for platform, held in presets.items()}
    for platform, case, contender, _ in page.TARGETS:
        assert any(name.startswith(case) for name in names[platform]), case
        assert contender in (*cases.PEERS, "sklearn_loop", "runs_alone", "one_run")


@pytest.mark.parametrize("line", ["", "not json\n", '{"case": "a"}\n', "[]\n"])
def test_what_is_no_record_is_refused_with_its_place(tmp_path, line):
    folder = _write(tmp_path)
    (folder / "2026-01-01_cpu" / "bench.json").write_text(line)
    with pytest.raises(UserError, match=r"bench\.json"):
        page.render(folder)
