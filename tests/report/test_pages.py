"""report: the page holds the numbers, is whole and self-contained; the table fits a terminal."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import example_runs
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from medfuse_jax import schema
from medfuse_jax.report import pages, read_runs, tables, terminal
from medfuse_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def pheno(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pheno") / "run"
    example_runs.write_fusion(folder, "pheno", num_stays=120)
    return folder


@pytest.fixture(scope="module")
def mortality(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mortality") / "run"
    example_runs.write_fusion(folder, "mortality", num_stays=240)
    return folder


@pytest.fixture(scope="module")
def pheno_page(pheno, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("out")
    pages.write([pheno], out)
    return (out / "index.html").read_text()


def make(runs: Path, out: Path) -> str:
    pages.write([runs], out)
    return (out / "index.html").read_text()


class Page(html.parser.HTMLParser):
    """Collects rows of table cells, and fails on a tag that is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.rows, self.text, self.attributes = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1] += data


def test_the_page_is_well_formed_and_needs_nothing_else(pheno_page):
    page = Page(pheno_page)
    assert not re.findall(r"https?:|<script|<link|<img|@import|url\((?!#)", pheno_page)
    ids = [value for name, value in page.attributes if name == "id"]
    assert all(value in ids for value in re.findall(r"url\(#([\w-]+)\)", pheno_page))


def test_the_tables_hold_the_results(pheno, pheno_page):
    rows = Page(pheno_page).rows
    result = json.loads((pheno / "result.json").read_text())
    scores = result["subsets"]["paired"]
    low, high = scores["auroc_macro_ci"]
    value = f"{scores['auroc_macro']:.3f}"
    assert ["MedFuse", str(scores["num_samples"]), f"{value} {low:.3f}–{high:.3f}"] in [row[:3] for row in rows]
    released = scores["auroc_macro_ci_released"]
    assert ["MedFuse", f"{value} {released[0]:.3f}–{released[1]:.3f}"] in [row[:2] for row in rows]
    shock = schema.TASKS["pheno"].labels.index("Shock")
    scores = result["subsets"]["all"]
    prevalence = 100 * scores["num_positive"][shock] / scores["num_samples"]
    label_row = next(row for row in rows if row[0] == "Shock")
    assert label_row[1:3] == ["acute", f"{prevalence:.1f} %"]
    assert label_row[3].split()[0] == f"{scores['auroc'][shock]:.3f}"
    difference = result["comparisons"][0]
    at = next(i for i, row in enumerate(rows) if row[0] == "MedFuse − EHR only (LSTM)")
    assert rows[at - 1] == ["All test stays"] and difference["subset"] == "all"
    assert rows[at][1].split()[0] == f"{difference['auroc_macro']:+.3f}".replace("-", "−")


def test_the_page_says_what_and_on_whom(pheno_page):
    text = " ".join(Page(pheno_page).text)
    for part in ("Phenotyping with MedFuse", "Synthetic patients", "AUROC on all validation stays"):
        assert part in text
    for part in (
        "X-ray only (ResNet)",
        "Radiology findings",
        example_runs.PROVENANCE,
        '"learning_rate": 0.001',
        "1,234,567",
    ):
        assert part in text


def test_real_patients_are_not_called_synthetic(mortality, tmp_path):
    shutil.copytree(mortality, tmp_path / "run")
    for path in [*tmp_path.rglob("config.json"), *tmp_path.rglob("result.json")]:
        path.write_text(path.read_text().replace('"synthetic": true', '"synthetic": false'))
    assert "Synthetic patients" not in make(tmp_path / "run", tmp_path / "out")


def test_every_run_has_its_charts(pheno_page):
    labels = [value for name, value in Page(pheno_page).attributes if name == "aria-label"]
    assert labels.count("Training and validation loss by epoch") == labels.count("Validation AUROC by epoch") == 3
    assert sum(bool(re.match(r"(ROC|PR) curves of \d+ labels", label)) for label in labels) == 6
    assert "ROC curves, mean over labels, of MedFuse, EHR only (LSTM)" in labels


def test_mortality_has_age_groups_with_intervals(mortality, tmp_path):
    page = make(mortality, tmp_path)
    rows = {row[0]: row for row in reversed(Page(page).rows)}  # MedFuse's come first
    stored = np.load(mortality / "predictions_test.npz")
    include = (stored["age"] >= 40) & (stored["age"] < 60)
    label, score = stored["labels"][include, 0], stored["scores"][include, 0]
    row = rows["40 to 59"]
    auroc, auroc_ci = row[2].split()
    assert [row[1], auroc] == [f"{label.sum()} / {include.sum()}", f"{roc_auc_score(label, score):.3f}"]
    assert row[4].split()[0] == f"{average_precision_score(label, score):.3f}"
    low, high = (float(x) for x in auroc_ci.split("–"))
    rng = np.random.default_rng(5)
    draws = (rng.integers(len(label), size=len(label)) for _ in range(1000))
    expected = np.percentile([roc_auc_score(label[d], score[d]) for d in draws], [2.5, 97.5])
    np.testing.assert_allclose([low, high], expected, atol=0.02)  # other resamples
    counts = [int(rows[name][1].split(" / ")[1]) for name in ("18 to 39", "40 to 59", "60 to 79", "80 and over")]
    assert sum(counts) == len(stored["age"])
    at = next(i for i, row in enumerate(Page(page).rows) if row[0].startswith("Those with an X-ray"))
    of_paired = Page(page).rows[at + 1 : at + 5]
    assert sum(int(row[1].split(" / ")[1]) for row in of_paired) == stored["has_cxr"].sum() < len(stored["age"])
    include &= stored["has_cxr"]
    assert (
        of_paired[1][2].split()[0] == f"{roc_auc_score(stored['labels'][include, 0], stored['scores'][include, 0]):.3f}"
    )
    assert "released code" not in tables.results("mortality", [read_runs.read_run(mortality)])  # one label


def test_text_from_files_is_escaped(tmp_path):
    example_runs.write_config(tmp_path / "run", "<img src=x>", "<b>m</b>", note="</pre><script>x</script>")
    example_runs.write_training(tmp_path / "run", 2)
    text = make(tmp_path / "run", tmp_path / "out")
    Page(text)
    assert "<script" not in text and "<img" not in text and "<b>" not in text and "&lt;b&gt;m&lt;/b&gt;" in text


@pytest.mark.parametrize("missing", ["result.json", "metrics.jsonl", "predictions_test.npz", "config.json"])
def test_a_run_is_shown_as_far_as_it_went(mortality, tmp_path, missing):
    shutil.copytree(mortality, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    page = Page(make(tmp_path / "run", tmp_path / "out"))
    assert "MedFuse" in " ".join(page.text)
    if missing == "result.json":
        assert "MedFuse has no evaluation yet: 20 epochs of at most 20 trained" in " ".join(page.text)


def test_a_run_of_one_epoch_and_damaged_files_is_shown(tmp_path):
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    example_runs.write_training(tmp_path / "run", 1)
    (tmp_path / "run" / "result.json").write_text('{"subsets": ')
    printed = pages.write([tmp_path / "run"], tmp_path / "out")
    assert "warning: " in printed and "result.json cannot be read" in printed
    shown = " ".join(Page((tmp_path / "out" / "index.html").read_text()).text)
    assert "Not everything could be read" in shown and "1 epoch of at most 20 trained" in shown


def test_nan_results_are_dashes(pheno, tmp_path):
    result = json.loads((pheno / "result.json").read_text())
    scores = result["subsets"]["all"]
    for key in ("auroc", "auroc_ci", "auprc", "auprc_ci"):
        scores[key][0] = [None, None] if key.endswith("ci") else None
    scores |= {"auroc_macro": None, "auroc_macro_ci": [None, None], "auprc_macro": None}
    result["comparisons"][0] |= {"auroc_macro": None, "auroc_macro_ci": [None, None]}
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    page = Page(make(tmp_path / "run", tmp_path / "out"))
    row = next(row for row in page.rows if row[0] == schema.TASKS["pheno"].labels[0])
    assert row[3:] == ["–", "", "–"]
    assert "– [–, –]" in terminal.table([result])


def test_several_runs_stand_in_one_table(mortality, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(mortality / "pretrain_ehr", tmp_path / "runs" / name)
    page = Page(make(tmp_path / "runs", tmp_path / "out"))
    rows = [row[0] for row in page.rows]
    assert rows.count("EHR only (LSTM) (one)") == rows.count("EHR only (LSTM) (two)") > 0


def test_a_run_that_cannot_score_all_stands_beside_others_on_the_same_stays_alone(tmp_path):
    data = example_runs.simulate("pheno", 120)
    for method in ("uni_ehr", "medfuse", "uni_cxr"):
        example_runs.write_run(tmp_path / "runs" / method, "pheno", method, data, against=("uni_ehr",))
    path = tmp_path / "runs" / "uni_cxr" / "result.json"
    result = json.loads(path.read_text())
    num_paired = int(data["has_cxr"].sum())
    result["subsets"] = dict.fromkeys(("all", "paired"), result["subsets"]["paired"])
    result["comparisons"] = [{**result["comparisons"][1], "subset": name} for name in ("all", "paired")]
    path.write_text(json.dumps(result | {"num_left_out": 120 - num_paired}))
    shown = Page(make(tmp_path / "runs", tmp_path / "out"))
    group, stays = "", {}
    for row in shown.rows:
        group = row[0] if len(row) == 1 else group
        if row[0] in ("MedFuse", "X-ray only (ResNet)") and len(row) == 5:
            stays.setdefault(group, []).append(row[1])
    assert stays == {
        "All test stays": ["120"],
        "Test stays with an X-ray": [str(num_paired)] * 2,
        "Test stays without an X-ray": [str(120 - num_paired)],
    }
    (at,) = [i for i, row in enumerate(shown.rows) if row[0] == "X-ray only (ResNet) − EHR only (LSTM)"]
    before = [row[0] for row in shown.rows[:at] if len(row) == 1]
    assert before[-1] == "Test stays with an X-ray"
    words = " ".join(shown.text)
    assert f"Each label, on the {num_paired} of 120 test stays that it can score" in words
    labels = [value for name, value in shown.attributes if name == "aria-label"]
    assert "ROC curves, mean over labels, of MedFuse, EHR only (LSTM)" in labels
    alone = pages.write([tmp_path / "runs" / "uni_cxr"], tmp_path / "out")
    assert not re.search(r"X-ray only \(ResNet\) +all", alone) and re.search(
        r"X-ray only \(ResNet\) +with X-ray", alone
    )
    shown = " ".join(Page((tmp_path / "out" / "index.html").read_text()).text)
    assert f"on {num_paired} test stays (it cannot score {120 - num_paired} others) is" in shown


def test_the_text_table_fits_and_holds_the_results(pheno, mortality):
    folders = (pheno / "pretrain_ehr", pheno, mortality)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    results[1]["method"] = "a_method_with_a_name_that_is_far_too_long_for_a_terminal"
    printed = terminal.table(results)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:2] == ["Phenotyping, test split", "synthetic patients: says nothing about real ones"]
    scores = results[0]["subsets"]["all"]
    values = f"{scores['auroc_macro']:.3f} [{scores['auroc_macro_ci'][0]:.3f}, {scores['auroc_macro_ci'][1]:.3f}]"
    line = next(line for line in lines if line.startswith("EHR only (LSTM)"))
    assert values in line and line.split()[3:5] == ["all", "120"]
    # aligned: what is below 'AUROC' starts where it does
    assert line.index(values) == lines[2].index("AUROC")


def test_runs_of_one_method_are_told_apart_in_the_text_table(mortality, tmp_path):
    for name in ("one", "a_folder_with_a_name_that_is_far_too_long_for_the_column"):
        shutil.copytree(mortality / "pretrain_ehr", tmp_path / "runs" / name)
    lines = pages.write([tmp_path / "runs"], tmp_path / "out").splitlines()
    assert max(map(len, lines[:-1])) <= 100 and any(line.startswith("EHR only (LSTM) (one)  ") for line in lines)
    at = lines.index("EHR only (LSTM) (a_folder_with_a_name_that_is_far_too_long_for_the_column)")
    assert lines[at + 1].split()[0] == "all"


def test_the_text_table_takes_a_result_before_it_is_json():
    data = example_runs.simulate("mortality", 60)
    scores = example_runs.metrics.evaluate(data["labels"], example_runs.scores_of("medfuse", data), 40)
    printed = terminal.table([{"task": "mortality", "method": "medfuse", "subsets": {"all": scores}}])
    assert f"{scores['auroc_macro']:.3f} [{scores['auroc_macro_ci'][0]:.3f}" in printed and "synthetic" not in printed


def test_a_value_outside_its_own_interval_is_explained(pheno, tmp_path):
    """Percentiles of resamples can leave out the AUPRC of few positives: whoever sees that should know why."""
    result = json.loads((pheno / "result.json").read_text())
    said = read_runs.OUTSIDE_ITS_CI
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    for low, is_odd in ((0.2, False), (0.41, True)):
        result["subsets"]["paired"] |= {"auprc_macro": 0.4, "auprc_macro_ci": [low, 0.6]}
        result["subsets"]["unpaired"] |= {"auprc_macro": None, "auprc_macro_ci": [None, None]}
        for name in ("all", "unpaired"):
            result["subsets"][name] |= {"auroc_macro": 0.8, "auroc_macro_ci": [0.7, 0.9]}
        result["subsets"]["all"] |= {"auprc_macro": 0.5, "auprc_macro_ci": [0.3, 0.6]}
        (tmp_path / "run" / "result.json").write_text(json.dumps(result))
        assert (said in " ".join(terminal.table([result]).split())) == is_odd
        assert (said in " ".join(Page(make(tmp_path / "run", tmp_path / "out")).text)) == is_odd


def test_errors_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        pages.write([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    example_runs.write_training(tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*file cannot be written \(File exists\)"):
        pages.write([tmp_path / "run"], tmp_path / "file")


def test_the_command_runs_without_jax(mortality, tmp_path):
    """As typed, in a Python whose jax cannot be imported."""
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'tensorflow'), None)); "
        "runpy.run_module('medfuse_jax.report', run_name='__main__', alter_sys=True)"
    )
    root = Path(schema.__file__).parents[1]
    arguments = (f"--runs={mortality}", f"--out={tmp_path / 'out'}")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "In-hospital mortality, test split" in done.stdout and (tmp_path / "out" / "index.html").exists()
    failed = subprocess.run(
        [sys.executable, "-c", code, f"--runs={tmp_path / 'no'}", "--out=x"], cwd=root, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: --runs=") and failed.stderr.count("\n") == 1


def test_every_method_of_the_paper_has_a_name():
    assert {"uni_ehr", "uni_cxr", "early", "joint", "joint_zeros", "joint_learnable", "medfuse"} <= set(
        read_runs.METHOD_NAMES
    )
    assert set(read_runs.TASK_NAMES) == set(schema.TASKS)
    assert tables.subset_title("all", "radiology") == "All test X-rays"
