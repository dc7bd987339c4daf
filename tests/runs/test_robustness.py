"""The curves with less data: their ends are the plain results, a draw is nested, and few stays are not shown."""

import json

import numpy as np
import pytest

from medfuse_jax import evaluate, metrics
from medfuse_jax import run as run_lib
from medfuse_jax.data import missing
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.runs import checkpoints, robustness, workdir
from medfuse_jax.runs.progress import Progress

_OPTIONS = (20, 0, "stay")


@pytest.fixture(scope="module")
def scored():
    """300 stays, 120 with an X-ray, which the scores follow; `without`: noise."""
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 2)) < 0.3).astype(int)
    has_cxr = np.arange(300) < 120
    with_cxr = labels + 0.7 * rng.normal(size=labels.shape)
    noise = rng.normal(size=labels.shape)
    common = {"stay_id": np.arange(300), "subject_id": np.arange(300), "labels": labels, "has_cxr": has_cxr}
    common |= {"has_ehr": np.ones(300, bool)}
    return common | {"scores": np.where(has_cxr[:, None], with_cxr, noise)}, common | {"scores": noise}


def _auroc(scored, include_N):
    return metrics.macro(metrics.auroc(scored["labels"][include_N], scored["scores"][include_N]))


def test_the_ends_of_the_curves_are_the_results_of_those_stays(scored):
    whole, without = scored
    dropped, ehr_only = robustness.by_share(whole, without, _OPTIONS)
    paired_N, all_N = whole["has_cxr"], np.ones(300, bool)
    assert (dropped["name"], ehr_only["name"]) == ("cxr_dropped", "ehr_only")
    assert [p["at"] for p in dropped["points"]] == list(robustness.SHARES) == [p["at"] for p in ehr_only["points"]]
    for point, expected in (
        (dropped["points"][0], _auroc(whole, paired_N)),
        (dropped["points"][-1], _auroc(without, paired_N)),
        (ehr_only["points"][0], _auroc(whole, paired_N)),
        (ehr_only["points"][-1], _auroc(whole, all_N)),
    ):
        assert point["auroc_macro"] == pytest.approx(expected, abs=1e-6)
    assert dropped["points"][0]["auroc_macro"] > dropped["points"][5]["auroc_macro"] + 0.1
    counts = [p["num_samples"] for p in ehr_only["points"]]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (120, 300)


def test_few_stays_are_not_shown_and_methods_without_x_rays_have_no_curve_over_them(scored):
    whole = scored[0]
    few = {name: values[:125] for name, values in whole.items()} | {"has_cxr": np.arange(125) < 5}
    dropped, ehr_only = robustness.by_share(few, few, _OPTIONS)
    assert dropped["points"] == [] and ehr_only["points"][-1]["num_samples"] == 125
    assert [curve["name"] for curve in robustness.by_share(whole, None, _OPTIONS)] == ["ehr_only"]


def test_ehr_is_cut_in_index_and_record(shards):
    dataset = open_dataset(shards, "pheno")
    cut = missing.cut_ehr(dataset, 3)
    before, after = dataset.index["test"]["length"], cut.index["test"]["length"]
    np.testing.assert_array_equal(after, np.minimum(before, 3))
    i = int(before.argmax())
    np.testing.assert_array_equal(cut.splits["test"][i]["ehr"], dataset.splits["test"][i]["ehr"][:3])


def test_a_run_is_scored_with_fewer_hours(ehr_config, tmp_path):
    run = run_lib.open_run(ehr_config)
    workdir.claim(tmp_path, run)
    manager = checkpoints.open_manager(tmp_path)
    checkpoints.save(manager, run.fresh_state(), Progress(learning_rate=1e-3), is_best=True)
    manager.close()
    (hours,) = [curve for curve in evaluate.write_robustness(tmp_path) if curve["name"] == "ehr_hours"]
    written = json.loads((tmp_path / robustness.FILE).read_text())
    assert [c["name"] for c in written["curves"]] == ["ehr_only", "ehr_hours"] and written["step"] == 0
    whole = evaluate.evaluate(tmp_path)["subsets"]["all"]["auroc_macro"]
    assert hours["points"][-1]["auroc_macro"] == pytest.approx(whole, abs=1e-9)
    assert [p["at"] for p in hours["points"]][:3] == [2, 4, 8]
    assert len({p["auroc_macro"] for p in hours["points"]}) > 3  # the hours that are read change the scores
