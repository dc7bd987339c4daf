"""docs/performance.md shows the newest record, and its tables hold what the records say."""

import json
import re
from pathlib import Path

import pytest

from medfuse_jax.bench import cases, growth, parts
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]
_EMPTY = f"{growth.BEGIN}\n{growth.END}"
_PART_SECONDS = dict(zip(("ours", *parts.PARTS), (10.0, 0.5, 1.0, 3.0, 6.0, 2.0, 0.25)))


def _record(case, **fields) -> dict:
    settings = {"kind": case.kind, "method": case.method, "batch_size": case.batch_size}
    settings |= {"num_devices": case.num_devices, "parallel": case.parallel}
    counts = {"batches_per_repeat": 2, "time_steps_per_repeat": 80, "images_per_repeat": 6}
    environment = {"commit": "0", "time": "2026-01-02", "platform": "cpu", "device": "cpu"}
    row = {"case": case.name, "contender": "ours", "command": "", "settings": settings, "environment": environment}
    row |= counts | {"seconds": 0.256} | fields
    return row | {"seconds_min": row["seconds"], "seconds_max": row["seconds"]}


@pytest.fixture
def folder(tmp_path):
    """A complete record, and a page without tables."""
    folder = tmp_path / "results" / "2026-01-02_growth"
    folder.mkdir(parents=True)
    rows = [_record(case) for case in cases.preset("growth")[0] if case.kind == "step"]
    (parts_case,) = (case for case in cases.preset("growth")[0] if case.kind == "parts")
    rows += [_record(parts_case, contender=name, seconds=2 * s) for name, s in _PART_SECONDS.items()]
    _write(folder / "growth.json", rows)
    devices = cases.preset("devices")[0]
    _write(folder / "devices.json", [_record(case, seconds=1.0 + case.num_devices) for case in devices])
    (tmp_path / "performance.md").write_text(f"before\n{_EMPTY}\nafter\n")
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_page_is_current(tmp_path):
    page = (_ROOT / "docs" / "performance.md").read_text()
    (tmp_path / "performance.md").write_text(re.sub(f"{growth.BEGIN}.*{growth.END}", _EMPTY, page, flags=re.DOTALL))
    growth.write(_ROOT / "results", tmp_path)
    assert (tmp_path / "performance.md").read_text() == page, "run python -m medfuse_jax.bench.growth"


def test_parts_and_the_rest_sum_to_the_step():
    rows = [{"contender": name, "seconds": 2 * s, "batches_per_repeat": 2} for name, s in _PART_SECONDS.items()]
    seconds = growth.part_seconds(rows)
    assert seconds["cxr_half"] == 2.0 and seconds["cxr_encoder"] == 3.0 and seconds["rest"] == 1.25
    assert sum(s for name, s in seconds.items() if name != "whole") == seconds["whole"] == 10.0


def test_tables_hold_the_records(tmp_path, folder):
    growth.write(tmp_path / "results", tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n") and "`results/2026-01-02_growth`" in page
    assert "| ResNet: stages 3-4 | 3 s | 30% |" in page
    # 42,628 stays, 16 a batch, 0.128 s each
    assert "| medfuse | 16 | 40 | 3 | 128 ms | 5.7 min |" in page
    assert "| 2 | pmap | 1.5 s | 1.50 |" in page


@pytest.mark.parametrize("preset", ["growth", "devices"])
def test_incomplete_record_names_the_missing_case(tmp_path, folder, preset):
    path = folder / f"{preset}.json"
    first, *others = _read(path)
    _write(path, others)
    with pytest.raises(UserError) as error:
        growth.write(tmp_path / "results", tmp_path)
    assert (error.value.path, error.value.value) == (path, first["case"])
    assert _EMPTY in (tmp_path / "performance.md").read_text()


def test_damaged_record_is_an_error(tmp_path, folder):
    rows = _read(folder / "devices.json")
    _write(folder / "devices.json", [row | {"settings": {"kind": "step"}} for row in rows])
    with pytest.raises(UserError) as error:
        growth.write(tmp_path / "results", tmp_path)
    assert error.value.path == folder
    assert _EMPTY in (tmp_path / "performance.md").read_text()


def test_missing_records_name_the_folder(tmp_path):
    (tmp_path / "results" / "2026-01-01_a").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        growth.write(tmp_path / "results", tmp_path)
    assert error.value.path == tmp_path / "results"
