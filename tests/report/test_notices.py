"""What pages and printed tables say of missing classes and of groups that are all withheld."""

import json

import example_runs
import numpy as np
import pytest

from medfuse_jax import metrics
from medfuse_jax.report import notices, pages, read_runs, tables, terminal, wording


def _scores(label) -> dict:
    label = np.asarray(label)[:, None]
    return metrics.evaluate(label, np.linspace(0.1, 0.9, len(label))[:, None], 10)


def _result(**subsets) -> dict:
    facts = {"task": "mortality", "method": "uni_ehr", "split": "test", "labels": ["In-hospital mortality"]}
    return facts | {"subsets": subsets, "comparisons": [], "num_left_out": 0, "data": {}}


_NONE = "so there is no AUROC and no AUPRC."
_FEW = "fewer than 10, and no label has both classes"  # not which class: it would be that of single patients


@pytest.mark.parametrize(
    ("subsets", "sentence"),
    [
        ({"all": [0] * 12, "paired": [0] * 5}, f"All test stays: none of 12 is positive, {_NONE}"),
        ({"all": [1] * 12}, f"All test stays: none of 12 is negative, {_NONE}"),
        ({"all": [0, 1] * 9, "paired": [0] * 12}, f"Test stays with an X-ray: none of 12 is positive, {_NONE}"),
        ({"all": [0, 1] * 6, "paired": [0] * 5}, f"Test stays with an X-ray: {_FEW}, {_NONE}"),
        ({"all": [0, 1] * 6, "paired": [0, 1] * 3}, ""),
    ],
)
def test_a_test_set_with_one_class_is_named_once(tmp_path, subsets, sentence):
    result = _result(**{name: _scores(label) for name, label in subsets.items()})
    assert notices.one_class([result, result]) == ([sentence] if sentence else [])
    printed = " ".join(terminal.table([result, result], ["a", "b"]).split())  # before it is JSON: with NaN, not None
    assert printed.count(_NONE) == bool(sentence) and sentence in printed
    assert wording.OUTSIDE_ITS_CI not in printed
    example_runs.write_config(tmp_path / "run", "mortality", "uni_ehr")
    (tmp_path / "run" / "result.json").write_text(json.dumps(metrics.to_json(result)))
    page = pages.page(read_runs.find_runs([tmp_path]))
    assert page.count(_NONE) == bool(sentence) and sentence in page
    assert ("has no AUROC on the test set" in page) == sentence.startswith("All")


def test_no_label_of_several_with_both_classes_is_said_and_one_is_enough():
    labels, scores = np.zeros((20, 3), int), np.random.default_rng(0).random((20, 3))
    result = _result(all=metrics.evaluate(labels, scores, 10)) | {"task": "pheno", "split": "val"}
    assert notices.one_class([result]) == [f"All val stays: no label has both classes among 20, {_NONE}"]
    labels[3, 1] = 1
    assert notices.one_class([_result(all=metrics.evaluate(labels, scores, 10))]) == []


def test_an_attribute_whose_groups_are_all_withheld_is_named(tmp_path):
    example_runs.write_run(tmp_path, "mortality", "uni_ehr", example_runs.simulate("mortality", 240))
    run = read_runs.read_run(tmp_path)
    line = "Race or ethnicity: withheld, as each group has fewer than 10 stays, positives or negatives."
    assert line not in tables.subgroups(run)
    run.result["subgroups"].append({"by": "Race or ethnicity", "groups": [], "gap": None})
    assert line in tables.subgroups(run) and "Brier" in tables.subgroups(run)
    run.result["subgroups"] = run.result["subgroups"][-1:]
    assert line in tables.subgroups(run) and "<table" not in tables.subgroups(run)
    assert line in pages.page([run])
