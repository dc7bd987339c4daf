"""That no record holds what was not known by its cut-off: the written arrays and X-rays, against the raw events.

What wrote the arrays is not asked. Each event's step is worked out here once more, and every value must then be
that of an event of its own step, or the one carried forward. So arrays that are a step early, or hold one event of
later, fail. A bucket of stays at a time: the memory does not grow with the cohort.

Shape key: N stays of the task, S those of one bucket, R their steps, E their events, V 17 variables, F channels,
L labels with a time.
"""

import dataclasses
import datetime
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.ehr import events
from data_prep.ehr.discretize import Arrays
from data_prep.ehr.events import EPSILON_H
from data_prep.labels.hourly import Predictions
from data_prep.write import datasets, describe
from medfuse_jax import schema

MARGIN_EDGES_H = (0, 1, 2, 4, 8, 12, 24, 48)
IMAGE_SLACK_S = 1.0  # an X-ray's hours are float32: exact to 0.2 s up to 4,000 h
_FIRST_CHANNEL_V = np.cumsum([0, *(len(v.classes) or 1 for v in schema.VARIABLES)])[:-1]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the records of a task see.

    stays: the cohort. pairs: stay_id, dicom_id, cxr_time, a row an X-ray. window_h: hours from `intime` that may
    be seen, None for the whole stay. timestep_h: hours a step.
    """

    stays: pl.DataFrame
    arrays: Arrays
    pairs: pl.DataFrame
    window_h: float | None
    timestep_h: float

    def end_h(self) -> np.ndarray:
        """float64 [N]: hours from `intime` to the cut-off of each stay of the arrays."""
        los_h = self.stays["los_h"].to_numpy()[self.arrays.row]
        return los_h if self.window_h is None else np.minimum(los_h, self.window_h)


def check(seen: Seen, events_dir: Path, predictions: Predictions | None) -> dict:
    """What was checked, as counts. Fails (it can only be our mistake) on any violation, also under `python -O`.

    predictions: of a task with labels at several times, whose cut-offs are those times.
    """
    end_h_N, margin_h_N = seen.end_h(), np.zeros(len(seen.arrays.row))
    wrong_cells = 0
    for bucket, places_S in _places_by_bucket(seen.arrays):
        found = events.read_bucket(events_dir, bucket)
        latest_s_R, wrong = _check_bucket(seen, found, bucket, places_S, end_h_N[places_S])
        wrong_cells += wrong
        latest_s_S = np.maximum.reduceat(latest_s_R, seen.arrays.start[places_S])
        margin_h_N[places_S] = end_h_N[places_S] - latest_s_S / 3600.0
    labels_outside = 0 if predictions is None else _labels_outside(seen, end_h_N, predictions)
    image_margin_h, late_images = _check_images(seen, predictions)
    if wrong_cells or labels_outside or late_images:
        raise AssertionError(
            f"{wrong_cells} values of steps, {labels_outside} labels and {late_images} X-rays are too late"
        )
    end = "the end of the stay"
    if seen.window_h is not None:
        end = f"{seen.window_h:g} h, or the end of the stay before it"
    return {
        "records": len(seen.arrays.row),
        "images": len(seen.pairs),
        "violations": 0,
        "cut_off": end if predictions is None else f"{end} (of each label, its own time)",
        "hours_from_latest_event_to_cut_off": describe.histogram(margin_h_N, MARGIN_EDGES_H),
        "hours_from_cxr_to_cut_off": describe.histogram(image_margin_h, MARGIN_EDGES_H),
    }


def _places_by_bucket(arrays: Arrays):
    """Bucket -> the places of its stays in the arrays' index."""
    for bucket in np.unique(arrays.bucket).tolist():
        yield bucket, np.flatnonzero(arrays.bucket == bucket)


def _check_bucket(seen: Seen, found: pl.DataFrame, bucket: int, places_S: np.ndarray, end_h_S: np.ndarray):
    """(float64 [R]: seconds of the latest event of each step, -1 for none; how many cells hold what they may not)."""
    start_S, length_S = seen.arrays.start[places_S], seen.arrays.length[places_S]
    first = bucket * events.STAYS_PER_BUCKET
    place_of_stay = np.full(events.STAYS_PER_BUCKET, -1)
    place_of_stay[seen.arrays.row[places_S] - first] = np.arange(len(places_S))
    stay_E = place_of_stay[found["stay"].to_numpy().astype(np.int64) - first]
    hours_E = found["time_s"].to_numpy() / 3600.0
    # The slack is the benchmark's, at the end of a stay and of a step.
    known_E = (stay_E >= 0) & (hours_E > -EPSILON_H) & (hours_E <= end_h_S[stay_E] + EPSILON_H)
    if "stored_s" in found.columns:
        stored_h_E = found["stored_s"].fill_null(0).to_numpy() / 3600.0
        known_E &= stored_h_E <= end_h_S[stay_E] + EPSILON_H
    # A step ends at its upper edge, and an event on the edge is still in it; one at 0 is in the first.
    step_E = np.maximum(np.ceil(hours_E / seen.timestep_h - EPSILON_H).astype(np.int64) - 1, 0)
    on_last_edge_E = hours_E <= length_S[stay_E] * seen.timestep_h + EPSILON_H * (1 + seen.timestep_h)
    known_E &= (step_E < length_S[stay_E]) | on_last_edge_E
    row_E = (start_S[stay_E] + np.minimum(step_E, length_S[stay_E] - 1))[known_E]

    num_steps = int(length_S.sum())
    cell_E = row_E * len(schema.VARIABLES) + found["variable"].to_numpy()[known_E]
    value_E = found["value"].to_numpy()[known_E]
    low, high = (np.full(num_steps * len(schema.VARIABLES), at, np.float32) for at in (np.inf, -np.inf))
    np.minimum.at(low, cell_E, value_E)
    np.maximum.at(high, cell_E, value_E)
    latest_s_R = np.full(num_steps, -1.0)
    np.maximum.at(latest_s_R, row_E, found["time_s"].to_numpy()[known_E].astype(np.float64))
    ehr_RF = np.load(seen.arrays.folder / f"ehr_{bucket:05d}.npy", mmap_mode="r")
    assert len(ehr_RF) == num_steps
    shape = (num_steps, len(schema.VARIABLES))
    return latest_s_R, int(_wrong_cells(ehr_RF, start_S, low.reshape(shape), high.reshape(shape)).sum())


def _wrong_cells(ehr_RF: np.ndarray, start_S: np.ndarray, low_RV: np.ndarray, high_RV: np.ndarray) -> np.ndarray:
    """bool [R, V]: observed without an event of that step with such a value, or changed without being observed.

    low_RV, high_RV: the least and largest value of a step's events; inf and -inf where there is none.
    """
    num_values = len(schema.VALUE_CHANNELS)
    observed_RV = ehr_RF[:, num_values:] > 0
    value_RF = np.asarray(ehr_RF[:, :num_values])
    before_RF = np.concatenate([value_RF[:1], value_RF[:-1]])
    before_RF[start_S] = _defaults()
    changed_RV = np.logical_or.reduceat(value_RF != before_RF, _FIRST_CHANNEL_V, axis=1)
    wrong_RV = changed_RV & ~observed_RV
    for place, (variable, channel) in enumerate(zip(schema.VARIABLES, _FIRST_CHANNEL_V, strict=True)):
        # The mean of a minute's rows lies between them; a class is its place in `classes`.
        value_R = value_RF[:, channel]
        if variable.classes:
            value_R = value_RF[:, channel : channel + len(variable.classes)].argmax(1)
        outside_R = (value_R < low_RV[:, place]) | (value_R > high_RV[:, place])
        wrong_RV[:, place] |= observed_RV[:, place] & outside_R
    return wrong_RV


def _defaults() -> np.ndarray:
    """float32 [value channels]: what a stay holds before anything is observed."""
    default_F = np.zeros(len(schema.VALUE_CHANNELS), np.float32)
    for variable, channel in zip(schema.VARIABLES, _FIRST_CHANNEL_V, strict=True):
        if variable.classes:
            default_F[channel + variable.classes.index(variable.default)] = 1.0
        else:
            default_F[channel] = variable.default
    return default_F


def _labels_outside(seen: Seen, end_h_N: np.ndarray, predictions: Predictions) -> int:
    """How many labels have no step that ends by their time, or are after their stay's cut-off.

    The others' steps are those that end by the label's time, and none holds an event of after its own end.
    """
    if not len(predictions.place_N):
        return 0
    place_L = np.repeat(predictions.place_N, [len(times) for times in predictions.times])
    time_h_L = np.concatenate(predictions.times).astype(np.float64)
    steps_L = np.floor(time_h_L / seen.timestep_h + EPSILON_H)  # as many as may be read (records.py)
    outside_L = (steps_L < 1) | (steps_L > seen.arrays.length[place_L]) | (time_h_L > end_h_N[place_L] + EPSILON_H)
    return int(outside_L.sum())


def _check_images(seen: Seen, predictions: Predictions | None) -> tuple[np.ndarray, int]:
    """Hours from each X-ray to its stay's cut-off, and how many X-rays are outside it or said to be earlier."""
    end = pl.col("outtime")
    if seen.window_h is not None:
        end = pl.min_horizontal(end, pl.col("intime") + datetime.timedelta(hours=seen.window_h))
    images = seen.pairs.join(seen.stays, on="stay_id", maintain_order="left").with_columns(
        image_h=(pl.col("cxr_time") - pl.col("intime")).dt.total_milliseconds() / 3.6e6,
        margin_h=(end - pl.col("cxr_time")).dt.total_milliseconds() / 3.6e6,
    )
    assert len(images) == len(seen.pairs)
    late = (images["image_h"] < 0) | (images["margin_h"] < 0)
    if predictions is not None:
        # A label's X-rays are those whose hours, as the record says them, are at most the label's.
        said = datasets.images_by_stay(seen.stays, seen.pairs)
        hours_of = {(stay_id, dicom_id): float(h) for stay_id, of in said.items() for dicom_id, h in of}
        said_h = pl.Series(
            [hours_of[key] for key in images.select("stay_id", "dicom_id").iter_rows()], dtype=pl.Float64
        )
        late |= images["image_h"] > said_h + IMAGE_SLACK_S / 3600.0
    return images["margin_h"].to_numpy(), int(late.sum())
