"""The page of performance: its model finds planted numbers, and its tables are those of the records."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from medfuse_jax.bench import cases, growth, parts
from medfuse_jax.runtime.errors import UserError

_ROOT = Path(__file__).parents[2]


def _row(seconds_of, method, rows, time_steps, images):
    settings = {"kind": "step", "method": method, "batch_size": rows}
    counts = {"batches_per_repeat": 2, "images_per_batch": images, "images_per_repeat": 2 * images}
    return {
        "settings": settings,
        "time_steps_per_repeat": 2 * time_steps,
        "seconds": 2 * seconds_of(rows * time_steps, images),
        **counts,
    }


def _rows(seconds_of):
    ehr = [_row(seconds_of, "uni_ehr", b, t, 0) for b, t in ((16, 20), (16, 40), (32, 40))]
    return [*ehr, *(_row(seconds_of, "medfuse", 16, 40, p) for p in (3, 8))]


def test_the_model_finds_what_was_planted():
    found = growth.fit(_rows(lambda row_steps, images: 2e-4 * row_steps + 0.2 * images + (0.05 if images else 0.01)))
    np.testing.assert_allclose(found, [2e-4, 0.2, 0.01, 0.05], rtol=1e-6)
    other = growth.fit(_rows(lambda row_steps, images: 2.1e-4 * row_steps + 0.2 * images + (0.05 if images else 0.01)))
    assert abs(found[0] - other[0]) > 5e-6


def test_an_epoch_is_as_many_batches_as_its_stays_fill():
    rows = _rows(lambda row_steps, images: 2e-4 * row_steps + 0.2 * images)
    assert "| 5.7 min |" in growth._growth_table(rows)  # 42,628 stays, 16 a batch, 0.128 s each


def test_the_parts_and_the_rest_are_the_step():
    taken = dict(zip(("ours", *parts.PARTS), (10.0, 0.5, 1.0, 3.0, 6.0, 2.0, 0.25)))
    rows = [{"contender": name, "seconds": 2 * s, "batches_per_repeat": 2} for name, s in taken.items()]
    shares = growth._shares(rows)
    assert shares["cxr_half"] == 2.0 and shares["cxr_encoder"] == 3.0 and shares["rest"] == 1.25
    assert sum(s for name, s in parts.items() if name != "whole") == parts["whole"] == 10.0


def test_the_presets_that_the_page_is_made_of_have_what_it_asks_for():
    kinds = [case.kind for case in cases.preset("growth")[0]]
    assert kinds.count("parts") == 1 and kinds.count("step") >= len(growth.fit(_rows(lambda s, p: s + p)))


def test_the_page_is_that_of_the_newest_record(tmp_path):
    """Made again from the results, it is as it is; without a whole record, it has no table."""
    page = (_ROOT / "docs" / "performance.md").read_text()
    empty = re.sub(f"{growth._BEGIN}.*{growth._END}", _empty(), page, flags=re.DOTALL)
    (tmp_path / "performance.md").write_text(empty)
    try:
        growth.write(_ROOT / "results", tmp_path)
    except UserError:
        assert page == empty
    assert (tmp_path / "performance.md").read_text() == page


def _empty() -> str:
    return f"{growth._BEGIN}\n{growth._END}"


def test_tables_and_picture_are_made_of_records(tmp_path):
    folder, docs = tmp_path / "results" / "2026-01-02_growth", tmp_path / "docs"
    folder.mkdir(parents=True)
    docs.mkdir()
    (docs / "performance.md").write_text(f"before\n{_empty()}\nafter\n")
    about = {
        "contender": "ours",
        "environment": {"commit": "0", "time": "2026-01-02", "platform": "cpu", "device": "cpu"},
        "command": "",
    }
    steps = [about | row for row in _rows(lambda row_steps, images: 2e-4 * row_steps + 0.2 * images + 0.01)]
    taken = zip(("ours", *parts.PARTS), (10.0, 0.5, 1.0, 3.0, 6.0, 2.0, 0.25))
    part_rows = [
        about | {"contender": n, "seconds": s, "batches_per_repeat": 1, "settings": {"kind": "parts"}} for n, s in taken
    ]
    on = [{"num_devices": n, "parallel": mode, "kind": "step"} for n in (1, 2, 8) for mode in ("pmap", "jit")]
    devices = [about | {"seconds": 1.0 + s["num_devices"], "batches_per_repeat": 2, "settings": s} for s in on]
    _write(folder / "growth.json", _named("growth", steps + part_rows))
    _write(folder / "devices.json", _named("devices", devices))
    growth.write(tmp_path / "results", docs)
    page = (docs / "performance.md").read_text()
    assert page.startswith("before\n") and page.endswith("after\n")
    assert "| ResNet: stages 3-4 | 3 s | 30% |" in page and "b = 200 ms an X-ray" in page
    assert "| 2 | pmap | 1.5 s | 1.50 |" in page and "| predicted |" in page and "| v5e-256 | 16 |" in page
    assert "(+0%)" in page and "Adam" in (docs / "step_time.svg").read_text()
    written = {path: path.read_text() for path in docs.iterdir()}
    first, *others = _named("growth", steps + part_rows)
    _write(folder / "growth.json", [row for row in others if row["case"] != first["case"]])
    with pytest.raises(UserError, match=r"growth\.json lacks .*: run all of --preset=growth"):
        growth.write(tmp_path / "results", docs)
    damaged = [row | {"settings": {"kind": "step"}} for row in _named("devices", devices)]
    _write(folder / "growth.json", _named("growth", steps + part_rows))
    _write(folder / "devices.json", damaged)
    with pytest.raises(UserError, match=r"a record of .*2026-01-02_growth is damaged \(KeyError\('num_devices'\)\)"):
        growth.write(tmp_path / "results", docs)
    assert {path: path.read_text() for path in docs.iterdir()} == written


def _named(preset: str, rows: list[dict]) -> list[dict]:
    """The rows as records of the preset's cases, in turn."""
    names = [case.name for case in cases.preset(preset)[0]]
    assert len(rows) >= len(names)
    spread = [{"seconds_min": row["seconds"], "seconds_max": row["seconds"]} for row in rows]
    return [row | s | {"case": names[i % len(names)]} for i, (row, s) in enumerate(zip(rows, spread))]


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_missing_records_are_named(tmp_path):
    (tmp_path / "results" / "2026-01-01_a").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds growth\.json and devices\.json.*--preset=growth"):
        growth.write(tmp_path / "results", tmp_path)
