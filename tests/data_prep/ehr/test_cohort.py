"""The cohort's stays, deaths and splits, and errors for bad tables and lists."""

import dataclasses
import gzip

import pytest
from raw_tables import START, at, stay, write_mimic_iv

from data_prep import profiles
from data_prep.ehr import cohort
from data_prep.labels import mortality
from data_prep.raw import invalid, tables
from medfuse_jax.runtime.errors import UserError

MICU = "Medical Intensive Care Unit (MICU)"
STAYS = [
    stay(1),
    stay(2, last_careunit="SICU"),  # a transfer
    stay(3),
    stay(4, hadm_id=20_000_003),  # two stays in one admission
    stay(5, anchor_age=17),
    stay(6, anchor_age=18),
    stay(7, los=""),
    stay(8, intime="yesterday"),
    # Two stays in one admission, one of them a transfer: the other counts, as in the benchmark.
    stay(9),
    stay(10, hadm_id=20_000_009, subject_id=10_000_009, last_careunit="SICU"),
]


def _read(root, rows=None):
    raw = tables.mimic_iv(write_mimic_iv(root, STAYS if rows is None else rows))
    return raw, *cohort.read_stays(raw)


def test_filters_keep_and_count_stays(tmp_path):
    _, stays, flow = _read(tmp_path)
    assert stays["stay_id"].to_list() == [30_000_001, 30_000_006, 30_000_009]
    assert [step["stays"] for step in flow] == [10, 10, 10, 8, 6, 4, 4, 4, 4, 4, 4, 3, 3]
    first = stays.row(0, named=True)
    assert (first["los_h"], first["age"], first["gender"], first["first_careunit"]) == (72.0, 60.0, "F", MICU)
    assert str(first["intime"]) == START


def test_stays_without_patient_or_admission_and_duplicates_are_dropped(tmp_path):
    root = write_mimic_iv(tmp_path, [stay(1), stay(2), stay(3)])
    for table, lost in (("hosp/patients", "10000002"), ("hosp/admissions", "20000003")):
        path = tmp_path / f"{table}.csv.gz"
        lines = [line for line in gzip.decompress(path.read_bytes()).decode().splitlines() if lost not in line]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    path = tmp_path / "icu/icustays.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) * 2))  # a second header row among them
    stays, flow = cohort.read_stays(tables.mimic_iv(root))
    assert stays["stay_id"].to_list() == [30_000_001]
    assert [step["stays"] for step in flow][:3] == [7, 6, 3]  # the header has no ids


@pytest.mark.parametrize("changes", [{"outtime": "", "los": ""}, {"los": "300"}, {"intime": "yesterday"}, {}])
def test_a_second_stay_counts_whatever_its_times(tmp_path, changes):
    second = stay(2, hadm_id=20_000_001, subject_id=10_000_001, **changes)
    _, stays, flow = _read(tmp_path, [stay(0), stay(1), second])
    assert stays["stay_id"].to_list() == [30_000_000]
    assert {step["filter"]: step["stays"] for step in flow}["one such stay in the admission"] == 1


def test_rows_without_ids_are_not_counted_as_duplicates(tmp_path):
    rows = [stay(0), *(stay(n, stay_id=f"x{n}") for n in range(1, 4)), stay(4, subject_id="")]
    _, stays, flow = _read(tmp_path, rows)
    assert stays["stay_id"].to_list() == [30_000_000]
    assert [step["stays"] for step in flow][:3] == [5, 1, 1]


@pytest.mark.parametrize(("days", "kept"), [(366, True), (366.5, False), (146_097, False)])
def test_stays_of_more_than_a_year_are_dropped(tmp_path, days, kept):
    _, stays, flow = _read(tmp_path, [stay(0), stay(1, outtime=at(24 * days), los=str(days))])
    assert len(stays) == 1 + kept
    assert {step["filter"]: step["stays"] for step in flow}["of at most a year"] == 1 + kept


@pytest.mark.parametrize(
    ("changes", "died"),
    [
        ({}, 0),
        ({"deathtime": "2150-01-03 10:00:00"}, 1),
        ({"deathtime": "2150-01-05 00:00:00"}, 1),  # at discharge
        ({"deathtime": "2150-01-06 00:00:00"}, 0),
        ({"dod": "2150-01-04"}, 1),
        ({"dod": "2150-02-04"}, 0),
        ({"dod": "2150-01-01"}, 1),
        ({"deathtime": "2150-01-08 10:00:00", "dischtime": "once"}, 1),
        ({"dod": "2150-01-04", "dischtime": "once"}, 0),
        ({"deathtime": "2149-12-30 00:00:00", "dischtime": "once"}, 0),  # before the admission
        ({"deathtime": "2150-01-03 10:00:00", "admittime": "once"}, 1),
        ({"dischtime": "2150-01-05", "deathtime": "2150-01-05 14:20:00", "dod": "2150-01-05"}, 1),
    ],
)
def test_mortality_is_death_in_the_admission(tmp_path, changes, died):
    _, stays, _ = _read(tmp_path, [stay(1, **changes)])
    assert mortality.labels(stays).tolist() == [[died]]


def test_a_stay_that_begins_after_death_is_left_out_except_in_released(tmp_path):
    """Patient 0 gives organs after dying; the second admission of patient 1 lies within the first, before death."""
    death, later = (
        "2150-01-05 14:20:00",
        {"intime": "2150-01-05 14:30:00", "outtime": "2150-01-06 14:30:00", "los": "1"},
    )
    inside = later | {"admittime": "2150-01-05 00:00:00", "dischtime": "2150-01-08 00:00:00"}
    rows = [
        stay(0, deathtime=death, dischtime=death, dod="2150-01-05"),
        stay(1, deathtime="2150-01-09 10:00:00", dischtime="2150-01-10 00:00:00", dod="2150-01-09"),
        stay(2, subject_id=10_000_000, **later | {"admittime": death, "dischtime": "2150-01-06 15:00:00"}),
        stay(3, subject_id=10_000_001, **inside),
        stay(4, dod="2149-12-30"),
        stay(5, dod="2150-01-01"),
    ]
    raw, stays, flow = _read(tmp_path, rows)
    assert stays["stay_id"].to_list() == [30_000_000, 30_000_001, 30_000_003, 30_000_005]
    assert {step["filter"]: step["stays"] for step in flow}["begins before the patient's death"] == 4
    assert stays["died"].to_list() == [True, True, False, True]
    ends = ["2150-01-05 14:20:00", "2150-01-09 10:00:00", "2150-01-09 10:00:00", "2150-01-02 00:00:00"]
    assert stays["alive_until"].dt.to_string("%Y-%m-%d %H:%M:%S").to_list() == ends
    released, _ = cohort.read_stays(raw, dataclasses.replace(profiles.RELEASED, undiagnosed=True))
    assert len(released) == 6 and released["alive_until"].null_count() == 6


@pytest.mark.parametrize(
    "form",
    ["2150-01-03 10:00", "2150-01-03T10:00:00", "2150-01-03T10:00", " 2150-01-03 10:00:00", "2150-01-03 10:00:00.000"],
)
def test_times_may_be_written_in_other_forms(tmp_path, form):
    changes = {"deathtime": form, "admittime": "2149-12-31T00:00", "dischtime": "2150-01-05 00:00"}
    raw, stays, _ = _read(
        tmp_path, [stay(1, **changes), stay(2, intime="2150-01-01T00:00", outtime="2150-01-04T00:00")]
    )
    assert stays["died"].to_list() == [True, False] and stays["death_h"].to_list() == [58, None]
    assert set(tables.count_unreadable_times(raw).values()) == {0}


def test_unreadable_times_are_counted_and_refused_above_1_percent(tmp_path):
    stays = [stay(n, deathtime=at(70), dod="2150-01-03") for n in range(200)] + [stay(200), stay(201, dod=" ")]
    stays[3]["deathtime"] = stays[4]["deathtime"] = "03/01/2150"
    stays[5]["dod"] = "3 Jan"
    raw, read, _ = _read(tmp_path / "few", stays)
    expected = dict.fromkeys(("icustays.intime", "icustays.outtime", "admissions.admittime", "admissions.dischtime"), 0)
    expected |= {"admissions.deathtime": 2, "patients.dod": 1}
    assert tables.count_unreadable_times(raw) == expected
    assert read["died"].sum() == 200  # each has one readable time of death
    stays[6]["deathtime"] = "2150-01-03 10h"
    raw, _, _ = _read(tmp_path / "many", stays)
    with pytest.raises(UserError) as caught:
        tables.count_unreadable_times(raw)
    assert (caught.value.path, caught.value.field, caught.value.value) == (raw["admissions"].path, "deathtime", 3)


MIDNIGHT = {"dischtime": "2150-01-03 00:00:00", "dod": "2150-01-03"}


@pytest.mark.parametrize(
    ("changes", "death_h"),
    [
        ({"deathtime": "2150-01-03 10:00:00"}, 58),
        # As MIMIC-IV writes many deaths: discharged at 00:00 of that day.
        (MIDNIGHT | {"deathtime": "2150-01-03 22:20:00"}, 70 + 1 / 3),
        ({"dod": "2150-01-04"}, None),
        ({"deathtime": "2150-01-06 00:00:00"}, None),  # not in this admission
    ],
)
def test_the_hour_of_death_is_deathtime(tmp_path, changes, death_h):
    _, stays, _ = _read(tmp_path, [stay(1, **changes)])
    assert stays["death_h"].to_list() == [death_h if death_h is None else pytest.approx(death_h)]
    assert mortality.labels(stays)[0, 0] == ("dod" in changes or death_h is not None)


def test_the_demo_has_no_bad_stays_and_an_hour_for_every_death(real_data):
    stays, flow = cohort.read_stays(tables.mimic_iv(real_data / "mimic-iv-demo-2.2"))
    assert mortality.labels(stays).sum() == 10 and stays.filter("died")["death_h"].null_count() == 0
    left = {step["filter"]: step["stays"] for step in flow}
    assert left["with ids"] == left["not a duplicate"] == left["rows of icustays"]
    assert left["of at most a year"] == left["one such stay in the admission"]  # the filters in between drop nothing
    assert left["with the patient's own admission"] == left["with a patient and an admission"]


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"los": "1e-9"}, False),
        ({"los": "300"}, False),
        ({"los": "3e7"}, False),
        ({"los": str(3 + 2 / 1440)}, False),
        ({"los": str(3 + 0.9 / 1440)}, True),
        ({"outtime": "2150-01-03 23:58:00"}, False),
    ],
)
def test_stays_whose_los_is_not_outtime_minus_intime_are_dropped(tmp_path, changes, kept):
    exact = stay(0, outtime=at(71), los=str(71 / 24))
    _, stays, flow = _read(tmp_path, [exact, stay(1, **changes)])
    assert stays["stay_id"].to_list() == [30_000_000, 30_000_001][: 1 + kept]
    left = {step["filter"]: step["stays"] for step in flow}
    assert left["with a length of stay that is outtime - intime"] == 1 + kept


def _cut(days, decimals):
    return str(int(days * 10**decimals) / 10**decimals)


ROUNDED = {
    **{f"{n} decimals": lambda days, n=n: f"{days:.{n}f}" for n in (0, 1, 2)},
    "cut to one decimal": lambda days: _cut(days, 1),
    "cut to two decimals": lambda days: _cut(days, 2),
    "zeros at the end": lambda days: f"{days:.1f}00000",
    "without zeros": lambda days: f"{days:.2f}".rstrip("0").rstrip("."),
}


@pytest.mark.parametrize("written", ROUNDED)
def test_a_rounded_los_costs_no_stay(tmp_path, capsys, written):
    hours = [5.5, 7.3, 30.1, 40.77, 47.99, 71.9, *range(100, 106)]  # 47.99 h round to two days, the window of mortality
    rows = [stay(n, outtime=at(h), los=ROUNDED[written](h / 24)) for n, h in enumerate(hours)]
    hours.append(61.3)
    rows.append(stay(len(rows), outtime=at(61.3), los=str(61.3 / 24)))  # one that is not rounded
    wrong = stay(len(rows), outtime=at(50), los="5")  # more than rounding
    _, stays, flow = _read(tmp_path, [*rows, wrong])
    assert stays["los_h"].to_list() == pytest.approx(hours, abs=1e-3)
    left = {step["filter"]: step["stays"] for step in flow}
    assert left["with a length of stay that is outtime - intime"] == len(rows)
    assert "stays is rounded; their length is outtime - intime" in capsys.readouterr().err


def test_few_rounded_los_give_no_warning(tmp_path, capsys):
    rows = [stay(n) for n in range(99)] + [stay(99, outtime=at(71.5), los="2.98")]
    _, stays, _ = _read(tmp_path, rows)
    assert len(stays) == 100 and stays["los_h"][-1] == 71.5 and "is rounded" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"los": "72.0"}, "have a los that is not outtime - intime"),  # hours
        ({"outtime": ""}, "lack a valid intime, outtime or los"),
        ({"los": ""}, "lack a valid intime, outtime or los"),
    ],
)
@pytest.mark.parametrize("lost", [1, 2])
def test_stays_without_a_valid_length_give_a_warning_above_1_percent(tmp_path, capsys, changes, why, lost):
    rows = [stay(n, **(changes if n < lost else {})) for n in range(100)]
    assert len(_read(tmp_path, rows)[1]) == 100 - lost
    assert (f"2 of 100 stays {why}" in capsys.readouterr().err) == (lost == 2)


def test_stays_without_an_admission_give_a_warning(tmp_path, capsys):
    root = write_mimic_iv(tmp_path, [stay(n) for n in range(10)])
    path = root / "hosp/admissions.csv.gz"
    path.write_bytes(gzip.compress(b"".join(gzip.decompress(path.read_bytes()).splitlines(keepends=True)[:-1])))
    assert len(cohort.read_stays(tables.mimic_iv(root))[0]) == 9
    assert "1 of 10 stays have no row in patients or in admissions" in capsys.readouterr().err


@pytest.mark.parametrize("num_stays", [49, 50])
def test_a_cohort_without_deaths_gives_a_warning(tmp_path, capsys, num_stays):
    _read(tmp_path, [stay(n, hospital_expire_flag=int(n < 11)) for n in range(num_stays)])
    printed = capsys.readouterr().err
    assert ("no patient dies in hospital" in printed) == (num_stays == 50)
    assert f"11 of {num_stays} stays have a hospital_expire_flag that disagrees" in printed


@pytest.mark.parametrize("diagnosed", [0, 97, 99])
def test_stays_without_a_diagnosis_give_a_warning(tmp_path, capsys, diagnosed):
    root = write_mimic_iv(tmp_path, [stay(n) for n in range(100)], codes=[(n, "4019", 9) for n in range(diagnosed)])
    cohort.read_stays(tables.mimic_iv(root))
    assert ("3 of 100 stays have no diagnosis" in capsys.readouterr().err) == (diagnosed == 97)


def test_units_are_compared_without_case_and_blanks(tmp_path):
    unit = stay(0)["first_careunit"]
    rows = [stay(0, last_careunit=f"{unit} "), stay(1, last_careunit=unit.lower()), stay(2, last_careunit="Other")]
    assert len(_read(tmp_path, rows)[1]) == 2


@pytest.mark.parametrize("age", ["", "> 60", "NaN", "sixty", "2064", "-1"])
@pytest.mark.parametrize(("unreadable", "stops"), [(2, False), (3, True)])
def test_unreadable_ages_have_their_own_filter_and_stop_above_1_percent(tmp_path, capsys, age, unreadable, stops):
    rows = [stay(n, **({"anchor_age": age} if n < unreadable else {})) for n in range(200)]
    if stops:
        with pytest.raises(UserError, match="more than 1 %: write them as MIMIC does, in whole years") as caught:
            _read(tmp_path, rows)
        assert (caught.value.field, caught.value.value) == ("anchor_age", 3)
        assert "60" not in str(caught.value).replace(str(tmp_path), "")
        return
    _, stays, flow = _read(tmp_path, rows)
    left = {step["filter"]: step["stays"] for step in flow}
    assert (left["with the patient's own admission"], left["with a readable age"], len(stays)) == (200, 198, 198)
    line = f"2 of 200 ages in column 'anchor_age' are invalid ({invalid.form(age)}); their stays are left out"
    assert line in capsys.readouterr().err


def test_stays_with_another_patients_admission_are_dropped(tmp_path):
    root = write_mimic_iv(tmp_path, [stay(0), stay(1)])
    path = root / "hosp/admissions.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"10000001,", b"10000777,")))
    stays, flow = cohort.read_stays(tables.mimic_iv(root))
    assert stays["stay_id"].to_list() == [30_000_000]
    assert {step["filter"]: step["stays"] for step in flow}["with the patient's own admission"] == 1


def _table_error(root):
    with pytest.raises(UserError) as caught:
        tables.mimic_iv(root)
    return caught.value


def test_a_bad_table_is_named(tmp_path):
    root = write_mimic_iv(tmp_path, [stay(1)], gz=False)
    plain, gz = root / "icu/icustays.csv", root / "icu/icustays.csv.gz"
    plain.write_text("subject_id,hadm_id\n1,2\n")
    error = _table_error(root)
    assert (error.path, error.field) == (plain, "stay_id") and "it has: subject_id, hadm_id" in str(error)
    plain.unlink()
    assert _table_error(root).path == gz  # missing
    for content in (b"", gzip.compress(b"")):
        gz.write_bytes(content)
        assert "is empty" in str(_table_error(root)) and _table_error(root).path == gz
    assert _table_error(root / "nowhere").path == root / "nowhere"


def test_only_released_drops_stays_without_a_diagnosis(tmp_path):
    # The code of stay 2 belongs to another patient.
    raw = tables.mimic_iv(write_mimic_iv(tmp_path, [stay(0), stay(1), stay(2)], codes=[(0, "4019", 9), (2, "4019", 9)]))
    path = raw["diagnoses_icd"].path
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"10000002", b"10000009")))
    stays, flow = cohort.read_stays(raw, profiles.RELEASED)
    assert stays["stay_id"].to_list() == [30_000_000] and flow[-1] == {"filter": "with a diagnosis", "stays": 1}
    for profile in (profiles.PAPER, profiles.rules("strict")):
        assert cohort.read_stays(raw, profile)[0]["has_diagnosis"].to_list() == [True, False, False]


def test_an_empty_cohort_names_the_filter(tmp_path):
    with pytest.raises(UserError) as caught:
        _read(tmp_path, [stay(1, anchor_age=3)])
    assert caught.value.value == "18 years or older"


def test_race_is_that_of_the_admission_in_every_version(tmp_path):
    for layout, column in (("hosp", "race"), ("core", "ethnicity")):
        rows = [stay(1, **{column: "WHITE - RUSSIAN"}), stay(3, **{column: "Mr Smith"}), stay(6)]
        raw = tables.mimic_iv(write_mimic_iv(tmp_path / layout, rows, layout=layout))
        assert cohort.read_stays(raw)[0]["race"].to_list() == ["White", "Other", "Unknown"]
