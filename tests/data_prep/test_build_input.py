"""A build's options, and its errors and warnings for bad input."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from absl import flags
from build_cases import HEART_RATE, read_all, write_one_stay, write_tree
from raw_tables import at, chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build, cache, profiles
from medfuse_jax import records, schema
from medfuse_jax.runtime.errors import TryLater, UserError


@pytest.mark.parametrize("timestep_h", [1 / 60, 48.0])
def test_the_shortest_and_longest_steps_build(tmp_path, timestep_h):
    build.build(*write_one_stay(tmp_path), tmp_path / "out", timestep_h=timestep_h, tasks=list(schema.TASKS))
    (record,) = (r for rows in read_all(tmp_path / "out", "mortality").values() for r in rows)
    assert len(record["ehr"]) == round(48 / timestep_h)


def test_tasks_may_be_one_text_as_in_the_command(tmp_path):
    build.build(*write_one_stay(tmp_path), tmp_path / "out", tasks="pheno,mortality")
    assert [records.manifest(tmp_path / "out", task)["task"] for task in ("pheno", "mortality")] == [
        "pheno",
        "mortality",
    ]


def test_a_table_may_be_a_symbolic_link(tmp_path):
    tree = write_one_stay(tmp_path)
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".csv.gz") as elsewhere:  # only one folder above it
        link = tree[0] / "hosp/patients.csv.gz"
        shutil.copy(link, elsewhere.name)
        link.unlink()
        link.symlink_to(elsewhere.name)
        build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert records.manifest(tmp_path / "out", "pheno")["synthetic"] is False


def test_two_builds_cannot_write_to_one_folder(raw_tree, tmp_path):
    with cache.private(tmp_path), pytest.raises(TryLater, match="another build is writing"):
        build.build(*raw_tree, tmp_path)


def test_an_unreadable_image_is_listed_and_the_one_before_it_paired(tmp_path):
    images = [image(0, 1), image(0, 5, k=1), *(image(n, 1) for n in range(100, 200))]
    tree = (
        write_mimic_iv(tmp_path / "iv", [stay(0)], [chart(0, 3, HEART_RATE, "70")]),
        write_mimic_cxr(tmp_path / "cxr", images, size=(16, 16)),
    )
    broken = tree[1] / image_path(images[1])
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["dicom_id"] == "image-0000-00"
    assert sum(map(len, read_all(tmp_path / "out", "radiology").values())) == 101
    for task in ("pheno", "radiology"):
        assert list(records.manifest(tmp_path / "out", task)["skipped_images"]) == ["image-0000-01"]
    broken.write_bytes(whole)  # once it is repaired, the same command rebuilds
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["dicom_id"] == "image-0000-01" and records.manifest(tmp_path / "out", "pheno")["skipped_images"] == {}


def test_suspicious_input_gives_a_warning(tmp_path, capsys):
    iv = write_mimic_iv(
        tmp_path / "iv",
        [stay(0), stay(1, los="0.5", outtime=at(12), last_careunit="CCU")],
        [chart(0, h, HEART_RATE, "61") for h in range(1, 60)],
        codes=[(0, "4019", 9)],
    )
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released")
    printed = capsys.readouterr().err
    assert "cohort: 1 of 2 ICU stays; removed 1 that fail 'no transfer between units'" in printed
    assert "labevents.csv.gz has no row of any variable" in printed and "chartevents" not in printed
    assert "--profile=released with 2 h steps" in printed and "--profile=released without --phenotypes" in printed
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released", timestep_h=1)
    assert "h steps" not in capsys.readouterr().err


def test_strict_needs_storetimes(tmp_path, capsys):
    tree = write_one_stay(tmp_path)
    build.build(*tree, tmp_path / "out", tasks=["pheno"], profile="strict")
    assert "warning: 59 events have no storetime and are kept" in capsys.readouterr().err
    chart = tree[0] / "icu/chartevents.csv.gz"
    text = gzip.decompress(chart.read_bytes())
    assert b",storetime," in text
    chart.write_bytes(gzip.compress(text.replace(b",storetime,", b",stored,", 1)))
    with pytest.raises(UserError) as caught:
        build.build(*tree, tmp_path / "out2", tasks=["pheno"], profile="strict")
    assert (caught.value.path, caught.value.field) == (chart, "storetime")
    build.build(*tree, tmp_path / "out2", tasks=["pheno"])


def test_output_cannot_be_written_into_the_raw_data(tmp_path):
    tree = write_one_stay(tmp_path / "raw")
    before = sorted(tree[0].rglob("*"))
    inside = tmp_path / "out" / "pheno"
    inside.mkdir(parents=True)
    shutil.copytree(tree[0], inside / "iv")
    for iv, out in ((inside / "iv", tmp_path / "out"), (tree[0], tree[0]), (tree[0], tree[0] / "hosp" / "out")):
        with pytest.raises(UserError) as caught:
            build.build(iv, None, out)
        assert (caught.value.field, caught.value.path) == ("--out", out)
    assert sorted(tree[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "field", "nearest"),
    [
        ({"profile": "papre"}, "--profile", "paper"),
        ({"tasks": ["phenotyping"]}, "--tasks", "pheno"),
        ({"pairing": "outtime"}, "--pairing", "until_outtime"),
        ({"pairing": "until_outtime", "profile": "strict"}, "--pairing", ""),
        ({"timestep_h": 0}, "--timestep_h", ""),
        ({"timestep_h": float("nan")}, "--timestep_h", ""),
        ({"timestep_h": 1e9}, "--timestep_h", ""),
        ({"timestep_h": 1e-8}, "--timestep_h", ""),
        ({"workers": 0}, "--workers", ""),
        ({"out": "s3://bucket/shards"}, "--out", ""),
        ({"mimic_iv": "gs://mimiciv-3.1.physionet.org"}, "--mimic_iv", ""),
        ({"cxr_layout": "flt"}, "--cxr_layout", "flat"),
        ({"allow_missing_images": 20}, "--allow_missing_images", ""),
        ({"val_ids": "nowhere.csv"}, "--val_ids", ""),
        ({"phenotypes": "nowhere.yaml"}, "--phenotypes", ""),
        ({"mimic_cxr": None, "tasks": ["radiology"]}, "--tasks", ""),
        ({"mimic_iv": "nowhere"}, "--mimic_iv", ""),
        ({"mimic_iv": ""}, "--mimic_iv", ""),
        ({"mimic_cxr": ""}, "--mimic_cxr", ""),
        ({"out": ""}, "--out", ""),
    ],
)
def test_wrong_options_are_refused_by_name(raw_tree, tmp_path, changes, field, nearest):
    arguments = {"mimic_iv": raw_tree[0], "mimic_cxr": raw_tree[1], "out": tmp_path} | changes
    with pytest.raises(UserError) as caught:
        build.build(**arguments)
    assert (caught.value.field, caught.value.nearest) == (field, nearest)
    assert not any((tmp_path / task).exists() for task in schema.TASKS) and not Path("s3:").exists()


@pytest.mark.parametrize("name", ["val_ids", "phenotypes"])
def test_a_pipe_in_place_of_a_list_or_table_is_refused(raw_tree, tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(UserError, match="is a pipe or device") as caught:
            build.build(*raw_tree, tmp_path / "out", **{name: path})
        assert caught.value.field == f"--{name}"


@pytest.mark.parametrize("name", ["mimic_iv", "mimic_cxr", "out", "val_ids", "test_ids", "phenotypes"])
def test_an_empty_folder_or_file_is_refused_in_one_line(raw_tree, tmp_path, name):
    given = {"mimic_iv": raw_tree[0], "mimic_cxr": raw_tree[1], "out": tmp_path / "out"} | {name: ""}
    arguments = [f"--{flag}={value}" for flag, value in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.build", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, f"error: --{name} is empty: give a value, or leave it out\n")
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_cannot_be_written_is_named(raw_tree):
    with pytest.raises(UserError, match="--out=/proc/nothing/out cannot be written"):
        build.build(*raw_tree, "/proc/nothing/out")


def _break(root, table, how):
    path = root / f"{table}.csv.gz"
    text = gzip.decompress(path.read_bytes()).decode()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.write_bytes(gzip.compress(text.replace(how, "other", 1).encode()))


@pytest.mark.parametrize(
    ("table", "how", "field"),
    [
        ("iv/icu/chartevents", "missing", "--mimic_iv"),
        ("iv/hosp/labevents", "empty", ""),
        ("iv/icu/chartevents", "truncated", ""),
        ("iv/hosp/patients", "truncated", ""),
        ("iv/hosp/diagnoses_icd", "icd_code", "icd_code"),
        ("cxr/mimic-cxr-2.0.0-chexpert", "Pneumonia", "Pneumonia"),
        ("cxr/mimic-cxr-2.0.0-metadata", "missing", "--mimic_cxr"),
    ],
)
def test_an_error_names_the_bad_table_in_one_line(tmp_path, table, how, field):
    tree = write_tree(tmp_path)
    _break(tmp_path, table, how)
    with pytest.raises(UserError) as caught:
        build.build(*tree, tmp_path / "out", timestep_h=1)
    assert (caught.value.path, caught.value.field) == (tmp_path / f"{table}.csv.gz", field)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "out" / task).exists() for task in schema.TASKS)


def test_more_than_1_percent_unreadable_images_stop_the_build_unless_allowed(tmp_path):
    tree = write_tree(tmp_path)
    missing, broken = sorted((tree[1] / "files").rglob("*.jpg"))[:2]
    missing.unlink()
    broken.write_bytes(b"broken")
    with pytest.raises(UserError, match=f"1 of 11 X-rays are missing and 1 are unreadable.*first tried: {missing}"):
        build.build(*tree, tmp_path / "out", timestep_h=1)
    assert not any((tmp_path / "out" / task).exists() for task in schema.TASKS)
    build.build(*tree, tmp_path / "out", timestep_h=1, allow_missing_images=0.2)
    assert len(records.manifest(tmp_path / "out", "radiology")["skipped_images"]) == 2
    audit = json.loads((tmp_path / "out/audit.json").read_text())["tasks"]
    assert audit["mortality"]["images_missing_or_unreadable"] == "<10"


@pytest.mark.parametrize("folder", ["files", "."])
def test_x_rays_may_lie_in_one_folder(tmp_path, folder):
    images = [image(n, 5) for n in range(3)]
    iv, cxr = write_one_stay(tmp_path, images)
    build.build(iv, cxr, tmp_path / "tree", tasks=["radiology"])
    paths = [cxr / image_path(row) for row in images]
    (tmp_path / "flat").mkdir()
    for path in paths:
        path.rename(tmp_path / "flat" / path.name)
    shutil.rmtree(cxr / "files")
    for path in (tmp_path / "flat").iterdir():
        (cxr / folder).mkdir(exist_ok=True)
        # The content decides, not the name.
        path.rename(cxr / folder / path.name.replace("image-0001-00.jpg", "image-0001-00.png"))
    for layout in ("auto", "flat"):
        build.build(iv, cxr, tmp_path / layout, tasks=["radiology"], cxr_layout=layout)
        assert by_dicom(tmp_path / layout) == by_dicom(tmp_path / "tree")
    with pytest.raises(UserError, match=f"first tried: {paths[0]}"):
        build.build(iv, cxr, tmp_path / "again", tasks=["radiology"], cxr_layout="tree")


def test_without_x_rays_the_message_names_the_published_path(tmp_path):
    iv, cxr = write_one_stay(tmp_path, [image(0, 5)])
    (cxr / "files").rename(cxr / "files.old")
    with pytest.raises(UserError, match=f"first tried: {cxr / image_path(image(0, 5))}"):
        build.build(iv, cxr, tmp_path / "out", tasks=["radiology"])
    (cxr / "1.png").write_bytes(b"")  # now the X-rays may lie beside it
    with pytest.raises(UserError, match=f"first tried: {cxr / 'image-0000-00.jpg'}"):
        build.build(iv, cxr, tmp_path / "out", tasks=["radiology"])


def by_dicom(out):
    return {row["dicom_id"]: row["image"].tobytes() for rows in read_all(out, "radiology").values() for row in rows}


def test_the_command_parses_its_flags_and_explains_profiles():
    values = flags.FlagValues()
    build.define_flags(values)
    values(["build", "--mimic_iv=a", "--out=b", "--tasks=pheno,mortality", "--timestep_h=1", "--profile=strict"])
    assert (values.tasks, values.timestep_h, values.profile) == (["pheno", "mortality"], 1.0, "strict")
    text = profiles.explain("released")
    for name, rule in profiles.describe("released").items():
        assert f"{name} = {rule['value']}" in text and rule["why"] in text
    assert "* fio2_percent" in text and "* " not in profiles.explain("paper").split("\n", 1)[1]
    assert f"* pairing = until_outtime\n      {profiles.PAIRING['until_outtime']}" in profiles.explain(
        "paper", "until_outtime"
    )
    with pytest.raises(UserError) as caught:
        profiles.explain("stict")
    assert caught.value.nearest == "strict"
