"""BENCHMARKS.md is made from the records in results/; a damaged record is named."""

import json
from pathlib import Path

import pytest

from medfuse_jax.bench import cases, page
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]


def _row(median=3.25, **changes) -> dict:
    environment = {"platform": "cpu", "device": "cpu", "num_local_devices": 1, "cpu": "A CPU", "cores": 2}
    environment |= {"commit": "abc", "time": "2026-01-01T10:20:30"} | changes.pop("environment", {})
    row = {"case": "step medfuse B=16 19% paired 2 h float32", "contender": "torch_released", "seconds": 2.0}
    row |= {"seconds_min": 1.5, "seconds_max": 2.5, "samples_per_s": 8.0, "command": "python -m medfuse_jax.bench"}
    row |= {"time_over_ours": {"median": median, "min": 3.1, "max": 30.5}, "settings": {"kind": "step"}}
    return row | changes | {"environment": environment}


def _write(folder: Path, *rows, name: str = "2026-01-01_cpu") -> Path:
    path = folder / name / "bench.json"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_page_is_current():
    text = (_ROOT / "BENCHMARKS.md").read_text()
    assert text == page.render(_ROOT / "results"), "run python -m medfuse_jax.bench.page"


def test_every_record_folder_has_a_readme():
    assert [p.name for p in (_ROOT / "results").iterdir() if not (p / "README.md").exists()] == []


@pytest.mark.parametrize(
    ("median", "shown"),
    [(3.25, "| 3.25 (3.10-30) / 3 |"), (3.0, "| 3.00 (3.10-30) / 3 |"), (2.99, "| **2.99 (3.10-30) / 3: missed** |")],
)
def test_headline_shows_speed_up_target_and_machine(tmp_path, median, shown):
    _write(tmp_path, _row(median))
    text = page.render(tmp_path)
    assert shown in text and "A CPU, 2 cores, 2026-01-01" in text
    assert "ahead of ours" not in text


def test_page_says_where_pytorch_is_faster(tmp_path):
    _write(tmp_path, _row(), _row(0.5, contender="torch_tuned"), _row(0.5, contender="one_run", case="sweep early 64"))
    text = page.render(tmp_path)
    assert "**Tuned PyTorch is ahead of ours on A CPU, 2 cores**" in text
    assert text.count("ahead of ours") == 1 and "19% paired 2 h (2.00 times as fast)." in text


def test_headline_shows_the_newest_record(tmp_path):
    newer = {"time": "2026-01-02T10:20:30"}
    _write(tmp_path, _row(4.5), _row(5.5, environment=newer))  # two in one file
    assert "| 5.50 (" in page.render(tmp_path) and "| 4.50 (" not in page.render(tmp_path)
    newest = _row(6.5, environment={"time": "2026-01-03T10:20:30"})
    _write(tmp_path, newest, _row(7.5, environment={"time": "2026-01-04"}, input="shards"), name="2026-01-01_again")
    headline, _, records = page.render(tmp_path).partition("## How to read it")
    assert "| 6.50 (" in headline and "5.50" not in headline and "7.50" not in headline
    assert records.index("2026-01-01_again") < records.index("2026-01-01_cpu")


def test_command_includes_how_devices_are_simulated(tmp_path):
    _write(tmp_path, _row(environment={"num_local_devices": 8}))
    command = "NPROC=16 XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m medfuse_jax.bench"
    assert f"`{command}`" in page.render(tmp_path)


def test_command_with_a_bar_stays_in_its_table_cell(tmp_path):
    _write(tmp_path, _row(command="python -m medfuse_jax.bench '--only=lstm|step'"))
    assert r"'--only=lstm\|step'`" in page.render(tmp_path)


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
        {"environment": {"time": 5}},
    ],
)
def test_damaged_record_is_named(tmp_path, changes):
    path = _write(tmp_path, _row(), _row(**changes))
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert (error.value.path, error.value.row) == (path, 2)


@pytest.mark.parametrize(("line", "row"), [("", None), ("not json\n", 1), ('{"case": "a"}\n', 1), ("[]\n", 1)])
def test_file_without_records_is_named(tmp_path, line, row):
    path = _write(tmp_path)
    path.write_text(line)
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert (error.value.path, error.value.row) == (path, row)


def test_cases_that_were_not_measured_are_skipped(tmp_path):
    unreached = {
        "case": "rates of the device",
        "command": "c",
        "outcome": "not reached",
        "reason": "the budget is used up",
    }
    _write(tmp_path, _row(4.5), unreached)
    _write(tmp_path, unreached, name="2026-01-02_none")
    text = page.render(tmp_path)
    assert "| 4.50 (" in text and "2026-01-01_cpu" in text and "2026-01-02_none" not in text


def test_headline_record_without_a_ratio_is_refused(tmp_path):
    row = _row()
    del row["time_over_ours"]
    path = _write(tmp_path, row)
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert (error.value.path, error.value.row) == (path, 1)


def test_unreadable_file_and_empty_folder_are_named(tmp_path):
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert error.value.path == tmp_path
    path = tmp_path / "2026-01-01_cpu" / "bench.json"
    path.mkdir(parents=True)
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert error.value.path == path
    path.rmdir()
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert error.value.path == path


def test_every_headline_row_is_a_case_of_a_preset():
    presets = {"cpu": ("cpu", "sweeps"), "gpu": ("gpu",)}
    names = {platform: [c.name for p in held for c in cases.preset(p)[0]] for platform, held in presets.items()}
    for platform, case, contender, _ in page.HEADLINE:
        assert any(name.startswith(case) for name in names[platform]), case
        assert contender in (*cases.PEERS, "sklearn_loop", "runs_alone", "one_run")


def _compiled_row(**changes) -> dict:
    row = {"case": "step", "title": "MedFuse", "target": "h200", "launches": 3222, "launches_a_time_step": 37.0}
    row |= {"weight_copies": 106, "bytes": 2.8e9, "collectives": 0, "peak_bytes": 4.3e8, "device_bytes": 1.5e11}
    return row | {"fits": True, "environment": {"time": "2026-01-01T10:20:30"}} | changes


def test_compiled_figures_are_never_among_the_timings(tmp_path):
    _write(tmp_path, _row())
    newer = {"time": "2026-01-02T10:20:30"}
    refused = {"case": "held", "fits": False, "refused": "21.3G of 15.75G", "target": "v5e:2x2x1", "launches": None}
    _write(tmp_path, _compiled_row(), _compiled_row(launches=300, environment=newer), name="2026-01-01_compiled")
    _write(tmp_path, _compiled_row(**refused), name="2026-01-02_compiled")
    timings, _, counted = page.render(tmp_path).partition("## Compiled, not timed")
    assert "MedFuse" not in timings.partition("## How to read it")[0]
    assert "| MedFuse | h200 | 300 | 37.0 | 106 | 2,800 MB | 0 | 0.40 GB of 140 GB |  | 2026-01-02 |" in counted
    assert "3,222" not in counted and "does not fit: 21.3G of 15.75G" in counted


def test_a_damaged_compiled_record_is_named(tmp_path):
    _write(tmp_path, _row())
    path = _write(tmp_path, _compiled_row(), {"case": "step"}, name="2026-01-01_compiled")
    with pytest.raises(UserError) as error:
        page.render(tmp_path)
    assert (error.value.path, error.value.row) == (path, 2)
