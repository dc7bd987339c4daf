"""BENCHMARKS.md is what the records under results/ make it, and refuses what is no record."""

import json
from pathlib import Path

import pytest

from medfuse_jax.bench import page
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]


def _row(**changes) -> dict:
    environment = {
        "platform": "cpu", "device": "cpu", "num_local_devices": 1, "cpu": "A CPU", "cores": 2, "python": "3.11",
        "jax": "0.10", "flax": "0.12", "numpy": "2.0", "commit": "abc", "load_average": 0.5,
        "time": "2026-01-01T10:20:30",
    }  # fmt: skip
    row = {"case": "step medfuse B=16 19% paired 2 h float32", "contender": "torch_released", "seconds": 2.0}
    row |= {"seconds_min": 1.5, "seconds_max": 2.5, "samples_per_s": 8.0, "command": "python -m medfuse_jax.bench"}
    row |= {"time_over_ours": {"median": 3.25, "min": 3.1, "max": 3.5, "of_best": 3.3}, "environment": environment}
    row["settings"] = {"kind": "step"}
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


def test_the_command_of_simulated_devices_says_how_they_are_simulated(tmp_path):
    several = _row(environment=_row()["environment"] | {"num_local_devices": 8})
    repeat = "NPROC=16 XLA_FLAGS=--xla_force_host_platform_device_count=8 \\\n    python -m medfuse_jax.bench\n"
    assert f"```\n{repeat}```" in page.render(_write(tmp_path, several))


@pytest.mark.parametrize(("median", "verdict"), [(3.0, "reached"), (2.99, "**missed**")])
def test_a_target_is_reached_or_missed(tmp_path, median, verdict):
    text = page.render(
        _write(tmp_path, _row(time_over_ours={"median": median, "min": 1.0, "max": 4.0, "of_best": 2.0}))
    )
    assert f"| {verdict} |" in text


def test_the_newest_numbers_come_first_with_those_that_lead(tmp_path):
    _write(tmp_path, _row(time_over_ours={"median": 2.0, "min": 1.0, "max": 4.0, "of_best": 2.0}))
    newer = _row(environment=_row()["environment"] | {"time": "2026-01-02T10:20:30"})
    tuned = newer | {"contender": "torch_tuned", "time_over_ours": {"median": 0.9, "min": 0.8, "max": 1, "of_best": 1}}
    (tmp_path / "2026-01-01_again").mkdir()
    (tmp_path / "2026-01-01_again" / "bench.json").write_text(json.dumps(newer) + "\n" + json.dumps(tuned) + "\n")
    summary, newest, oldest = page.render(tmp_path).partition("## The newest")[2].split("<details")
    assert "3.25" in summary and "2.00 (" not in summary and "| torch_tuned | 0.90" in summary
    assert "2026-01-01_again" in newest and newest.startswith(" open>")
    assert "2026-01-01_cpu" in oldest and oldest.startswith(">")


def test_of_what_was_added_to_a_file_the_last_counts(tmp_path):
    newer = _row(environment=_row()["environment"] | {"time": "2026-01-02T10:20:30"})
    newer["time_over_ours"] = newer["time_over_ours"] | {"median": 2.0}
    text = page.render(_write(tmp_path, _row(), newer))
    assert "2.00" in text.partition("## The records")[0] and "3.25" not in text.partition("## The records")[0]
    assert "2026-01-02 10:20 UTC" in text


def test_a_ratio_that_is_aimed_at_must_be_there(tmp_path):
    row = _row()
    del row["time_over_ours"]
    with pytest.raises(UserError, match="line 1: not a record"):
        page.render(_write(tmp_path, row))


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": None},
        {"seconds": float("nan")},
        {"seconds_min": -1.0},
        {"contender": 7},
        {"settings": 3},
        {"samples_per_s": "a"},
        {"time_over_ours": {"median": None}},
        {"time_over_ours": None},
        {"environment": {"commit": "abc"}},
        {"environment": _row()["environment"] | {"time": 5}},
    ],
)
def test_a_damaged_record_is_named(tmp_path, changes):
    with pytest.raises(UserError, match=r"bench\.json, line 1: not a record"):
        page.render(_write(tmp_path, _row(**changes)))


def test_what_cannot_be_read_or_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no record"):
        page.render(tmp_path)
    (tmp_path / "2026-01-01_cpu" / "folder.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"folder\.json cannot be read"):
        page.render(tmp_path)
    (tmp_path / "2026-01-01_cpu" / "folder.json").rmdir()
    (tmp_path / "2026-01-01_cpu" / "bytes.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"bytes\.json cannot be read"):
        page.render(tmp_path)


def test_every_target_names_a_case_of_a_preset():
    from medfuse_jax.bench import cases

    presets = {"cpu": ("cpu", "sweeps"), "gpu": ("h200",)}
    names = {platform: [c.name for p in held for c in cases.preset(p)[0]] for platform, held in presets.items()}
    for platform, case, contender, _ in page.SHOWN:
        assert any(name.startswith(case) for name in names[platform]), case
        assert contender in (*cases.PEERS, "sklearn_loop", "runs_alone", "one_run")


@pytest.mark.parametrize("line", ["", "not json\n", '{"case": "a"}\n', "[]\n"])
def test_what_is_no_record_is_refused_with_its_place(tmp_path, line):
    folder = _write(tmp_path)
    (folder / "2026-01-01_cpu" / "bench.json").write_text(line)
    with pytest.raises(UserError, match=r"bench\.json"):
        page.render(folder)
