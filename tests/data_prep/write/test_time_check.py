"""Arrays, labels and X-rays that reveal the future stop the build, whatever code wrote them."""

import json

import numpy as np
import pytest
from raw_tables import at, chart, image, stay, write_mimic_cxr, write_mimic_iv

from data_prep import build
from data_prep.ehr import discretize
from data_prep.labels import hourly
from data_prep.write import datasets
from medfuse_jax import records, schema

HEART_RATE, EYE = 220045, 220739
ALL = ("pheno", "mortality", "decompensation", "length_of_stay")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three stays of 60, 71 and 82 h with events at odd minutes, some two per minute, and an X-ray each."""
    root = tmp_path_factory.mktemp("raw")
    stays, charts = [], []
    for n in range(3):
        los_h = 60 + 11 * n
        stays.append(stay(n, outtime=at(los_h), dischtime=at(los_h + 48), los=str(los_h / 24)))
        for hour in np.arange(0.4, los_h, 3.7):
            charts += [chart(n, hour, HEART_RATE, str(60 + int(7 * hour) % 50 + k)) for k in range(2)]
        charts.append(chart(n, 31, EYE, "To Pain"))
        charts.append(chart(n, 0, HEART_RATE, "99"))
    images = [image(n, 30.5) for n in range(3)]
    codes = [(n, "4019", 9) for n in range(3)]
    return write_mimic_iv(root / "iv", stays, charts, codes=codes), write_mimic_cxr(root / "cxr", images, size=(16, 16))


def _leaking(monkeypatch, change):
    """Write `change(ehr, lengths)` in place of the arrays."""
    original = discretize.discretize

    def changed(*args):
        ehr_RF, length_S, last_S = original(*args)
        return change(ehr_RF.copy(), length_S), length_S, last_S

    monkeypatch.setattr(discretize, "discretize", changed)


@pytest.mark.parametrize(
    ("profile", "timestep_h"), [("paper", 0.7), ("paper", 2.0), ("released", 1.0), ("strict", 0.7), ("strict", 2.0)]
)
def test_correct_arrays_pass(tree, tmp_path, timestep_h, profile):
    build.build(*tree, tmp_path, tasks=ALL, timestep_h=timestep_h, profile=profile)
    for task in ALL:
        check = records.manifest(tmp_path, task)["counts"]["time_check"]
        assert (check["records"], check["images"], check["violations"]) == (3, 3, 0)
        assert ("label" in check["cut_off"]) == schema.TASKS[task].hourly


def _one_step_early(ehr_RF, length_S):
    return np.roll(ehr_RF, -1, 0)


def _values_one_step_early(ehr_RF, length_S):
    ehr_RF[:, :59] = np.roll(ehr_RF[:, :59], -1, 0)
    return ehr_RF


def _a_class_one_step_early(ehr_RF, length_S):
    first = np.flatnonzero(ehr_RF[:, schema.CHANNELS.index("mask->Glascow coma scale eye opening")])[0]
    of_eye = [i for i, name in enumerate(schema.CHANNELS) if name.startswith("Glascow coma scale eye opening->")]
    ehr_RF[first - 1, of_eye] = ehr_RF[first, of_eye]
    return ehr_RF


def _one_value_of_the_next_observation(ehr_RF, length_S):
    heart_rate, mask = (schema.CHANNELS.index(name) for name in ("Heart Rate", "mask->Heart Rate"))
    first, second = np.flatnonzero(ehr_RF[:, mask])[4:6]
    ehr_RF[first:second, heart_rate] = ehr_RF[second, heart_rate]
    return ehr_RF


@pytest.mark.parametrize("task", ["mortality", "decompensation"])
@pytest.mark.parametrize(
    "change",
    [_one_step_early, _values_one_step_early, _a_class_one_step_early, _one_value_of_the_next_observation],
)
def test_arrays_with_later_values_stop_the_build(tree, tmp_path, monkeypatch, task, change):
    _leaking(monkeypatch, change)
    with pytest.raises(AssertionError, match=r"[1-9]\d* values of time steps, 0 labels and 0 X-rays"):
        build.build(tree[0], None, tmp_path, tasks=[task])
    assert not (tmp_path / task).exists()


def test_a_label_after_the_stay_stops_the_build(tree, tmp_path, monkeypatch):
    original = hourly.predictions

    def later(*args):
        predicted, flow = original(*args)
        predicted.times[:] = [times + 1 for times in predicted.times]
        return predicted, flow

    monkeypatch.setattr(hourly, "predictions", later)
    with pytest.raises(AssertionError, match=r" 3 labels and 0 X-rays are too late"):
        build.build(tree[0], None, tmp_path, tasks=["length_of_stay"])


def test_an_image_recorded_too_early_stops_the_build(tree, tmp_path, monkeypatch):
    original = datasets.images_by_stay

    def earlier(*args):
        return {stay: [(name, hours - 0.5) for name, hours in images] for stay, images in original(*args).items()}

    monkeypatch.setattr(datasets, "images_by_stay", earlier)
    with pytest.raises(AssertionError, match=r" 0 labels and 3 X-rays are too late"):
        build.build(*tree, tmp_path, tasks=["decompensation"])
    assert not (tmp_path / "decompensation").exists()


def test_strict_drops_events_stored_after_the_cut_off(tmp_path):
    rates = [
        chart(0, 47, HEART_RATE, "100", storetime=at(48.5)),
        chart(0, 46, HEART_RATE, "90", storetime=at(48)),
        chart(0, 40, HEART_RATE, "80", storetime="9999-01-01 00:00:00"),
        chart(0, 30, HEART_RATE, "70"),
    ]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0)], rates)
    seen = {}
    for profile in ("paper", "strict"):
        build.build(iv, None, tmp_path / profile, profile=profile, tasks=["mortality"])
        (record,) = (r for s in schema.SPLITS for r in records.open_split(tmp_path / profile, "mortality", s))
        seen[profile] = record["ehr"][:, schema.CHANNELS.index("mask->Heart Rate")].nonzero()[0].tolist()
        counts = records.manifest(tmp_path / profile, "mortality")["counts"]
        assert counts["events_stored_too_late"] == (2 if profile == "strict" else 0)
        shown = json.loads((tmp_path / profile / "audit.json").read_text())["tasks"]["mortality"]
        assert shown.get("events_stored_too_late") == ("<10" if profile == "strict" else None)
        page = (tmp_path / profile / "audit.html").read_text()
        assert ("stored too late: &lt;10;" in page) == (profile == "strict")
    assert seen == {"paper": [14, 19, 22, 23], "strict": [14, 22]}


def test_an_event_stored_too_late_stops_a_strict_build(tmp_path, monkeypatch):
    rates = [chart(0, 47, HEART_RATE, "100", storetime=at(49)), chart(0, 30, HEART_RATE, "70")]
    iv = write_mimic_iv(tmp_path / "iv", [stay(0)], rates)
    monkeypatch.setattr(discretize, "_stored_in_time", lambda found, *rest: (found, 0))
    with pytest.raises(AssertionError, match=r"^1 values of time steps"):
        build.build(iv, None, tmp_path / "out", profile="strict", tasks=["mortality"])
