"""The page holds the results, is well-formed and self-contained; the text table fits a terminal."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import example_runs
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medfuse_jax import metrics, schema
from medfuse_jax.report import pages, read_runs, tables, terminal, wording
from medfuse_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def pheno(tmp_path_factory) -> Path:
    """A MedFuse run with two pre-training runs."""
    folder = tmp_path_factory.mktemp("pheno") / "run"
    example_runs.write_fusion(folder, "pheno", num_stays=120)
    return folder


@pytest.fixture(scope="module")
def mortality(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mortality") / "run"
    example_runs.write_run(folder, "mortality", "uni_ehr", example_runs.simulate("mortality", 240))
    return folder


@pytest.fixture(scope="module")
def pheno_page(pheno, tmp_path_factory) -> str:
    return write_page(pheno, tmp_path_factory.mktemp("out"))


def write_page(runs: Path, out: Path) -> str:
    pages.write([runs], out)
    return (out / "index.html").read_text()


class Page(html.parser.HTMLParser):
    """Collects text, attributes and rows of table cells; fails if a tag is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.rows, self.texts, self.attributes = [], [], [], []
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
            self.texts.append(data)
        if {"td", "th"} & set(self.open) and "svg" not in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def labels(self) -> list[str]:
        return [value for name, value in self.attributes if name == "aria-label"]


def test_the_page_is_well_formed_and_self_contained(pheno_page):
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


def test_the_means_by_type_of_label_are_shown_by_subset(pheno, mortality):
    run = read_runs.read_run(pheno)
    rows = Page(tables.label_types(run)).rows
    for subset, title in (("all", "All test stays"), ("unpaired", "Test stays without an X-ray")):
        at = rows.index([title])
        scores = run.result["subsets"][subset]
        for i, kind in enumerate(("acute", "mixed", "chronic"), at + 1):
            of_kind = [k for k, p in enumerate(schema.PHENOTYPES) if p.kind == kind]
            low, high = scores["label_types"][kind]["auroc_macro_ci"]
            mean = np.mean([scores["auroc"][k] for k in of_kind])
            assert rows[i][:3] == [kind, str(len(of_kind)), f"{mean:.3f} {low:.3f}–{high:.3f}"]
    assert tables.label_types(run) in pages.page([run])
    assert tables.label_types(read_runs.read_run(mortality)) == ""


def test_the_page_names_tasks_methods_cohort_and_provenance(pheno_page):
    text = Page(pheno_page).text
    for part in (
        "Phenotyping with MedFuse",
        "Synthetic patients",
        "AUROC on all validation stays",
        "X-ray only (ResNet)",
        "Radiology findings",
        "All test X-rays",
        example_runs.PROVENANCE,
        '"learning_rate": 0.001',
        "1,234,567",
    ):
        assert part in text


def test_the_title_tells_runs_with_other_encoders_apart():
    def run(**encoders):
        result = {"method": "medfuse", **encoders}
        return types.SimpleNamespace(result=result, method="medfuse", task="pheno", is_pretraining=False)

    assert pages._title([run(), run()]) == "Phenotyping with MedFuse"
    assert pages._title([run(cxr_encoder="resnet50")]) == "Phenotyping with MedFuse, ResNet-50"
    assert pages._title([run(), run(cxr_encoder="resnet50")]) == "Phenotyping by 2 methods"


def test_every_run_has_its_charts(pheno_page):
    labels = Page(pheno_page).labels()
    assert labels.count("Training and validation loss by epoch") == labels.count("Validation AUROC by epoch") == 3
    assert sum(bool(re.match(r"(ROC|PR) curves of \d+ labels", label)) for label in labels) == 6
    assert "ROC curves, mean over labels, of MedFuse, EHR only (LSTM)" in labels


def test_groups_of_patients_show_their_metrics_and_no_small_counts(mortality):
    run = read_runs.read_run(mortality)
    rows = {row[0]: row for row in Page(tables.subgroups(run)).rows}
    stored = np.load(mortality / "predictions_test.npz")
    label, score = stored["labels"][1::2, 0], stored["scores"][1::2, 0]
    assert rows["F"][1:3] == [str(len(label)), str(label.sum())]
    assert rows["F"][3].split()[0] == f"{roc_auc_score(label, score):.3f}"
    assert rows["Rare"][1] == "withheld: too few" and rows["Medical"][1:3] == ["", ""]  # else Rare's count is known
    assert "lowest for" in tables.subgroups(run)
    run.result["subgroups"] = [{"by": "Age", "groups": "damaged"}, 3]
    assert tables.subgroups(run) == ""


def test_calibration_is_drawn_and_said(mortality):
    run = read_runs.read_run(mortality)
    assert "Fraction of positives by mean score" in Page(pages.page([run])).labels()
    assert "Brier score 0." in tables.calibration(run)
    scaled = run.result["calibration"].pop("scaled")
    assert "temperature" not in tables.calibration(run)  # a run from before training fitted one
    run.result["calibration"]["scaled"] = scaled | {"temperature": 1.5, "brier_macro": 0.1, "ece_macro": 0.02}
    assert "with temperature 1.50, fitted on the validation set: 0.100 and 0.020" in tables.calibration(run)
    run.result["calibration"] = {"curve": [{"score": 0.5, "positive": 1.0, "num_samples": 9}, "damaged"]}
    assert "Fraction of positives" not in pages.page([run])  # too few to show


def test_operating_points_and_net_benefit_are_shown_or_withheld(pheno, mortality):
    run = read_runs.read_run(mortality)
    of, rows = run.result["calibration"], Page(tables.operating_points(run)).rows
    assert rows[0] == ["Threshold", "Sensitivity", "Specificity", "PPV"]
    fields = ("threshold", "sensitivity", "specificity", "ppv")
    for row, point in zip(rows[1:4], of["operating_points"], strict=True):
        assert row == [f"{point[field]:.3f}" for field in fields]
    assert [row[0] for row in rows[5:]] == ["0.050", "0.100", "0.200", "0.300", "0.400", "0.500"]
    half = next(row for row in of["net_benefit"] if row["threshold"] == 0.5)
    assert rows[-1][1:] == [wording.number(half[name]) for name in ("model", "everyone")]
    text = pages.page([run])
    assert text.index("Brier score") < text.index(tables.operating_points(run)) < text.index("By group of patients")
    assert tables.operating_points(read_runs.read_run(pheno)) == ""  # 25 labels
    run.result["calibration"] = {"operating_points": [], "net_benefit": [], "operating_points_withheld": True}
    assert "Withheld: fewer than 10" in tables.operating_points(run)
    run.result["calibration"] = of  # a result of an earlier version, with 9 positives
    run.result["subsets"]["all"]["num_positive"] = [9]
    assert "Withheld" in tables.operating_points(run) and "0.800" not in tables.operating_points(run)


def test_real_patients_are_not_called_synthetic(mortality):
    run = read_runs.read_run(mortality)
    run.predictions = None
    assert "Synthetic patients" in pages.page([run])
    run.result["data"]["synthetic"] = False
    assert "Synthetic patients" not in pages.page([run])


def test_text_from_files_is_escaped(tmp_path):
    example_runs.write_config(tmp_path / "run", "<img src=x>", "<b>m</b>", note="</pre><script>x</script>")
    example_runs.write_training(tmp_path / "run", 2)
    text = write_page(tmp_path / "run", tmp_path / "out")
    Page(text)
    assert "<script" not in text and "<img" not in text and "<b>" not in text and "&lt;b&gt;m&lt;/b&gt;" in text


@pytest.mark.parametrize("missing", ["result.json", "metrics.jsonl", "predictions_test.npz", "config.json"])
def test_an_unfinished_run_is_shown(mortality, tmp_path, missing):
    shutil.copytree(mortality, tmp_path / "run")
    (tmp_path / "run" / missing).unlink()
    text = Page(write_page(tmp_path / "run", tmp_path / "out")).text
    assert "EHR only (LSTM)" in text
    assert ("EHR only (LSTM) is not evaluated yet: epoch 20 of at most 20" in text) == (missing == "result.json")


def test_damaged_files_are_reported_and_the_rest_shown(tmp_path):
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    example_runs.write_training(tmp_path / "run", 1)
    (tmp_path / "run" / "result.json").write_text('{"subsets": ')
    printed = pages.write([tmp_path / "run"], tmp_path / "out")
    assert "warning: " in printed and "result.json cannot be read" in printed
    text = Page((tmp_path / "out" / "index.html").read_text()).text
    assert "Some files are damaged" in text and "epoch 1 of at most 20" in text


def test_nan_results_are_dashes(pheno, tmp_path):
    result = json.loads((pheno / "result.json").read_text())
    scores = result["subsets"]["all"]
    for key in ("auroc", "auroc_ci", "auprc", "auprc_ci"):
        scores[key][0] = [None, None] if key.endswith("ci") else None
    scores |= {"auroc_macro": None, "auroc_macro_ci": [None, None], "auprc_macro": None}
    result["comparisons"][0] |= {"auroc_macro": None, "auroc_macro_ci": [None, None]}
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    page = Page(write_page(tmp_path / "run", tmp_path / "out"))
    row = next(row for row in page.rows if row[0] == schema.TASKS["pheno"].labels[0])
    assert row[3:] == ["–", "", "–"]
    assert "– [–, –]" in terminal.table([result])


def test_runs_of_one_method_are_told_apart(mortality, tmp_path):
    long_name = "a_folder_with_a_name_that_is_far_too_long_for_the_column"
    for name in ("one", long_name):
        shutil.copytree(mortality, tmp_path / "runs" / name)
    lines = pages.write([tmp_path / "runs"], tmp_path / "out").splitlines()
    assert max(map(len, lines[:-1])) <= 100 and any(line.startswith("EHR only (LSTM) (one)  ") for line in lines)
    at = lines.index(f"EHR only (LSTM) ({long_name})")
    assert lines[at + 1].split()[0] == "all"
    heads = [row[0] for row in Page((tmp_path / "out" / "index.html").read_text()).rows]
    assert heads.count("EHR only (LSTM) (one)") == heads.count(f"EHR only (LSTM) ({long_name})") > 0


def test_a_run_that_cannot_score_all_is_compared_on_the_same_stays_only(tmp_path):
    data = example_runs.simulate("pheno", 60)
    for method in ("uni_ehr", "medfuse", "uni_cxr"):
        example_runs.write_run(tmp_path / "runs" / method, "pheno", method, data, against=("uni_ehr",))
    path = tmp_path / "runs" / "uni_cxr" / "result.json"
    result = json.loads(path.read_text())
    num_paired = int(data["has_cxr"].sum())
    result["subsets"] = dict.fromkeys(("all", "paired"), result["subsets"]["paired"])
    result["comparisons"] = [{**result["comparisons"][1], "subset": name} for name in ("all", "paired")]
    path.write_text(json.dumps(result | {"num_left_out": 60 - num_paired}))
    runs = read_runs.find_runs([tmp_path / "runs"])
    (run,) = [run for run in runs if run.method == "uni_cxr"]
    page = Page(pages._task_section("pheno", runs, is_titled=False) + tables.labels(run, runs))
    group, stays = "", {}
    for row in page.rows:
        group = row[0] if len(row) == 1 else group
        if row[0] in ("MedFuse", "X-ray only (ResNet)") and len(row) == 5:
            stays.setdefault(group, []).append(row[1])
    assert stays == {
        "All test stays": ["60"],
        "Test stays with an X-ray": [str(num_paired)] * 2,
        "Test stays without an X-ray": [str(60 - num_paired)],
    }
    (at,) = [i for i, row in enumerate(page.rows) if row[0] == "X-ray only (ResNet) − EHR only (LSTM)"]
    groups_before = [row[0] for row in page.rows[:at] if len(row) == 1]
    assert groups_before[-1] == "Test stays with an X-ray"
    assert f"Each label, on the {num_paired} of 60 test stays it can score" in page.text
    assert "ROC curves, mean over labels, of MedFuse, EHR only (LSTM)" in page.labels()
    printed = terminal.table([run.result])
    assert not re.search(r"X-ray only \(ResNet\) +all", printed)
    assert re.search(r"X-ray only \(ResNet\) +with X-ray", printed)
    assert f"on {num_paired} test stays; it cannot score the other {60 - num_paired}" in pages._lead(run)


def test_the_text_table_fits_and_holds_the_results(pheno, mortality):
    results = [json.loads((f / "result.json").read_text()) for f in (pheno / "pretrain_ehr", pheno, mortality)]
    results[1]["method"] = "a_method_with_a_name_that_is_far_too_long_for_a_terminal"
    lines = terminal.table(results).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[:2] == ["Phenotyping, test split", "synthetic patients: says nothing about real ones"]
    scores = results[0]["subsets"]["all"]
    values = f"{scores['auroc_macro']:.3f} [{scores['auroc_macro_ci'][0]:.3f}, {scores['auroc_macro_ci'][1]:.3f}]"
    line = next(line for line in lines if line.startswith("EHR only (LSTM)"))
    assert values in line and line.split()[3:5] == ["all", "120"]
    assert line.index(values) == lines[2].index("AUROC")  # columns are aligned


def test_the_text_table_takes_a_result_before_it_is_json():
    data = example_runs.simulate("mortality", 60)
    scores = metrics.evaluate(data["labels"], example_runs.scores_of("medfuse", data), 40)
    printed = terminal.table([{"task": "mortality", "method": "medfuse", "subsets": {"all": scores}}])
    assert f"{scores['auroc_macro']:.3f} [{scores['auroc_macro_ci'][0]:.3f}" in printed and "synthetic" not in printed


def test_a_value_outside_its_own_interval_is_explained(mortality):
    """With few positives, the AUPRC can lie outside the percentiles of its resamples."""
    run = read_runs.read_run(mortality)
    subsets = run.result["subsets"]
    for low, is_outside in ((0.2, False), (0.41, True)):
        for name in ("all", "unpaired"):
            subsets[name] |= {"auroc_macro": 0.8, "auroc_macro_ci": [0.7, 0.9]}
        subsets["all"] |= {"auprc_macro": 0.5, "auprc_macro_ci": [0.3, 0.6]}
        subsets["paired"] |= {"auprc_macro": 0.4, "auprc_macro_ci": [low, 0.6]}
        subsets["unpaired"] |= {"auprc_macro": None, "auprc_macro_ci": [None, None]}
        assert (wording.OUTSIDE_ITS_CI in " ".join(terminal.table([run.result]).split())) == is_outside
        assert (wording.OUTSIDE_ITS_CI in tables.results("mortality", [run])) == is_outside


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(UserError) as no_run:
        pages.write([tmp_path], tmp_path / "out")
    assert no_run.value.path == tmp_path and not (tmp_path / "out").exists()
    example_runs.write_config(tmp_path / "run", "pheno", "medfuse")
    example_runs.write_training(tmp_path / "run", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out=.*file"):
        pages.write([tmp_path / "run"], tmp_path / "file")


def test_the_command_runs_without_jax(mortality, tmp_path):
    """As typed, in a Python whose jax cannot be imported."""
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(('jax', 'jaxlib', 'flax', 'tensorflow'), None)); "
        "runpy.run_module('medfuse_jax.report', run_name='__main__', alter_sys=True)"
    )
    root = Path(schema.__file__).parents[1]
    command = [sys.executable, "-c", code, f"--runs={mortality}", f"--out={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "In-hospital mortality, test split" in done.stdout and (tmp_path / "out" / "index.html").exists()
