"""The mean and spread of one experiment over seeds and folds, and which runs are one."""

import json

import numpy as np
import pytest
from example_runs import simulate, write_run

from medfuse_jax.report import pages, read_runs, repeats, terminal


def _write(folder, seed: int, fold: int | None = None, method="uni_ehr"):
    write_run(folder, "mortality", method, simulate("mortality", 200, seed=10 * seed + (fold or 0)))
    path = folder / "result.json"
    content = json.loads(path.read_text()) | {"seed": seed}
    content["data"] |= {} if fold is None else {"folds": 2, "fold": fold}
    path.write_text(json.dumps(content))
    return content


@pytest.fixture
def written(tmp_path):
    """Two seeds on two folds, and a run without a repetition."""
    results = [_write(tmp_path / f"s{seed}f{fold}", seed, fold) for seed in (0, 1) for fold in (0, 1)]
    _write(tmp_path / "other", 0, method="medfuse")
    return tmp_path, results


def test_the_spread_is_the_samples_deviation(written):
    _, results = written
    values = [result["subsets"]["paired"]["auroc_macro"] for result in results]
    found = repeats.summary(results)["paired"]["auroc_macro"]
    assert found.mean == pytest.approx(np.mean(values)) and found.sd == pytest.approx(np.std(values, ddof=1))
    assert found.sd != pytest.approx(np.std(values))  # a likely mistake
    assert (found.low, found.high, found.count) == (min(values), max(values), 4)
    assert repeats.summary(results[:1])["paired"]["auroc_macro"].sd is None
    assert repeats.words(results) == "4 runs: 2 seeds, 2 folds"


def test_the_report_joins_the_runs_of_one_experiment(written):
    root, results = written
    page = pages.page(read_runs.find_runs([root]))
    assert "Over seeds and folds" in page and "4 runs: 2 seeds, 2 folds" in page
    assert repeats.summary(results)["all"]["auroc_macro"].text() in page
    assert "Over seeds and folds" not in pages.page(read_runs.find_runs([root / "s0f0", root / "other"]))


def test_a_run_of_a_fold_is_named_after_it(written):
    """Its test patients are others than those of a run beside it."""
    root, results = written
    runs = read_runs.find_runs([root / "s0f0", root / "s0f1", root / "other"])
    assert [run.name for run in runs] == ["EHR only (LSTM), fold 0 of 2", "EHR only (LSTM), fold 1 of 2", "MedFuse"]
    assert "EHR only (LSTM), fold 1 of 2" in terminal.table([results[1]])


def test_runs_of_one_seed_and_fold_are_no_repetition(written):
    """Such as trials of a sweep that were evaluated by hand."""
    root, _ = written
    _write(root / "again", 1, 1)
    assert repeats.groups(read_runs.find_runs([root])) == []
