"""What a build says of its options and of bad input."""

import gzip
import shutil
import subprocess
import tempfile

import pytest
from absl import flags
from build_cases import HEART_RATE, ROOT, command, read_all, write_one_stay, write_tree
from raw_tables import at, chart, image, image_path, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build, cache, profiles
from medfuse_jax import records, schema
from medfuse_jax.runtime.errors import UserError


@pytest.mark.parametrize("timestep_h", [1 / 60, 48.0])
def test_the_shortest_and_the_longest_step_build(tmp_path, timestep_h):
    build.build(*write_one_stay(tmp_path), tmp_path / "out", timestep_h=timestep_h, tasks=list(schema.TASKS))
    (record,) = (r for rows in read_all(tmp_path / "out", "mortality").values() for r in rows)
    assert len(record["ehr"]) == round(48 / timestep_h)


def test_a_table_may_be_a_link_to_anywhere(tmp_path):
    tree = write_one_stay(tmp_path)
    with tempfile.NamedTemporaryFile(dir="/tmp", suffix=".csv.gz") as elsewhere:  # one folder below the root
        link = tree[0] / "hosp/patients.csv.gz"
        shutil.copy(link, elsewhere.name)
        link.unlink()
        link.symlink_to(elsewhere.name)
        build.build(*tree, tmp_path / "out", tasks=["pheno"])
    assert records.manifest(tmp_path / "out", "pheno")["synthetic"] is False


def test_two_builds_do_not_share_a_folder(raw_tree, tmp_path):
    with cache.private(tmp_path), pytest.raises(UserError, match="another build is writing"):
        build.build(*raw_tree, tmp_path)


def test_an_unreadable_image_is_skipped_listed_and_the_one_before_it_taken(tmp_path):
    images = [image(0, 1), image(0, 5, k=1), *(image(n, 1) for n in range(100, 200))]
    stays = [stay(0)]
    tree = (
        write_mimic_iv(tmp_path / "iv", stays, [chart(0, 3, HEART_RATE, "70")]),
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
    broken.write_bytes(whole)  # mended: the same command makes it anew
    build.build(*tree, tmp_path / "out", tasks=["pheno", "radiology"])
    (record,) = (r for rows in read_all(tmp_path / "out", "pheno").values() for r in rows)
    assert record["dicom_id"] == "image-0000-01" and records.manifest(tmp_path / "out", "pheno")["skipped_images"] == {}


def test_what_looks_wrong_with_the_input_is_said(tmp_path, capsys):
    iv = write_mimic_iv(
        tmp_path / "iv",
        [stay(0), stay(1, los="0.5", outtime=at(12), last_careunit="CCU")],
        [chart(0, h, HEART_RATE, "61") for h in range(1, 60)],
    )
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released")
    said = capsys.readouterr().err
    assert "cohort: 1 of 2 ICU stays; left out 1 by 'no transfer between units'" in said
    assert "labevents.csv.gz has no row of any variable: is it the whole table?" in said and "chartevents" not in said
    assert "--profile=released with 2 h steps: the released code's arrays have --timestep_h=1" in said
    build.build(iv, None, tmp_path / "out", tasks=["pheno"], profile="released", timestep_h=1)
    assert "h steps: the released" not in capsys.readouterr().err


def test_strict_needs_to_know_when_events_were_stored(tmp_path, capsys):
    tree = write_one_stay(tmp_path)
    build.build(*tree, tmp_path / "out", tasks=["pheno"], profile="strict")
    said = capsys.readouterr().err
    assert "warning: 59 events have no storetime and are kept" in said
    chart = tree[0] / "icu/chartevents.csv.gz"
    text = gzip.decompress(chart.read_bytes())
    assert b",storetime," in text
    chart.write_bytes(gzip.compress(text.replace(b",storetime,", b",stored,", 1)))
    with pytest.raises(
        UserError, match=r"chartevents\.csv\.gz has no column 'storetime', which --profile=strict needs"
    ):
        build.build(*tree, tmp_path / "out2", tasks=["pheno"], profile="strict")
    build.build(*tree, tmp_path / "out2", tasks=["pheno"])


def test_the_output_is_not_written_into_what_was_downloaded(tmp_path):
    tree = write_one_stay(tmp_path / "raw")
    before = sorted(tree[0].rglob("*"))
    inside = tmp_path / "out" / "pheno"
    inside.mkdir(parents=True)
    shutil.copytree(tree[0], inside / "iv")
    with pytest.raises(UserError, match="overlap"):
        build.build(inside / "iv", None, tmp_path / "out")
    for out in (tree[0], tree[0] / "hosp" / "out"):
        with pytest.raises(UserError, match="which holds what was downloaded, overlap: give a folder elsewhere"):
            build.build(*tree, out)
    assert sorted(tree[0].rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": "papre"}, "--profile is 'papre'.*Did you mean 'paper'"),
        ({"tasks": ["phenotyping"]}, "--tasks is 'phenotyping'.*Did you mean 'pheno'"),
        ({"timestep_h": 0}, "--timestep_h is 0"),
        ({"timestep_h": float("nan")}, "--timestep_h is nan"),
        ({"timestep_h": 1e9}, "--timestep_h is 1000000000.0; it must be from 1/60"),
        ({"timestep_h": 1e-8}, "--timestep_h is 1e-08; it must be from 1/60"),
        ({"workers": 0}, "--workers is 0"),
        ({"val_ids": "nowhere.csv"}, "nowhere.csv cannot be read"),
        ({"phenotypes": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"mimic_cxr": None, "tasks": ["radiology"]}, "no task is left"),
        ({"mimic_iv": "nowhere"}, "--mimic_iv=nowhere is not a folder"),
        ({"out": "/proc/nothing/out"}, "--out=/proc/nothing/out cannot be written"),
    ],
)
def test_wrong_options_are_refused_by_name(raw_tree, tmp_path, changes, message):
    arguments = {"mimic_iv": raw_tree[0], "mimic_cxr": raw_tree[1], "out": tmp_path} | changes
    with pytest.raises(UserError, match=message):
        build.build(**arguments)
    assert not any((tmp_path / task).exists() for task in schema.TASKS)


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
    ("table", "how", "message"),
    [
        ("icu/chartevents", "missing", "holds no icu/chartevents.csv.gz"),
        ("hosp/labevents", "empty", "labevents.csv.gz is empty"),
        ("icu/chartevents", "truncated", "chartevents.csv.gz cannot be read: it ends too early"),
        ("hosp/patients", "truncated", "patients.csv.gz cannot be read: it ends too early"),
        ("hosp/diagnoses_icd", "icd_code", "diagnoses_icd.csv.gz has no column 'icd_code'"),
        ("cxr/mimic-cxr-2.0.0-chexpert", "Pneumonia", "chexpert.csv.gz has no column 'Pneumonia'"),
        ("cxr/mimic-cxr-2.0.0-metadata", "missing", "holds no mimic-cxr-2.0.0-metadata.csv.gz"),
        ("cxr/files", "missing", "more than 1 %"),
    ],
)
def test_bad_input_is_one_line(tmp_path, table, how, message):
    iv, images = write_tree(tmp_path)
    if table == "cxr/files":
        next((images / "files").rglob("*.jpg")).write_bytes(b"broken")
    else:
        _break(tmp_path if table.startswith("cxr") else iv, table, how)
    with pytest.raises(UserError) as caught:
        build.build(iv, images, tmp_path / "out", timestep_h=1)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not any((tmp_path / "out" / task).exists() for task in schema.TASKS)


def test_the_command_ends_in_that_line(tmp_path):
    iv, images = write_tree(tmp_path)
    _break(iv, "icu/chartevents", "truncated")
    done = subprocess.run(
        command((iv, images), tmp_path / "out", {}), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "it ends too early" in last and "Traceback" not in done.stderr


def test_the_command_knows_its_flags_and_explains(capsys):
    values = flags.FlagValues()
    build.define_flags(values)
    values(["build", "--mimic_iv=a", "--out=b", "--tasks=pheno,mortality", "--timestep_h=1", "--profile=strict"])
    assert (values.tasks, values.timestep_h, values.profile) == (["pheno", "mortality"], 1.0, "strict")
    text = profiles.explain("released")
    for name, rule in profiles.describe("released").items():
        assert f"{name} = {rule['value']}" in text and rule["why"] in text
    assert "* fio2_percent" in text and "* " not in profiles.explain("paper").split("\n", 1)[1]
    with pytest.raises(UserError, match="Did you mean 'strict'"):
        profiles.explain("stict")
