"""Check that no record contains anything from after its cut-off, by comparing it with the raw events.

The check computes each event's time step independently of the code that wrote the arrays. A value must come from an
event of its own step, or be the value of the step before. Arrays that are shifted by one step, or hold a single event
from after the cut-off, fail. One bucket of stays is checked at a time, so memory does not grow with the cohort.

Shape key: N stays of the task, S stays of one bucket, R their time steps, E their events, V 17 variables, F channels,
L labels with a time.
"""

import dataclasses
import datetime
from pathlib import Path

import numpy as np
import polars as pl

from data_prep.ehr import events
from data_prep.ehr.arrays import EPSILON_H, Arrays
from data_prep.labels.hourly import Predictions
from data_prep.write import datasets, describe
from medfuse_jax import schema

MARGIN_EDGES_H = (0, 1, 2, 4, 8, 12, 24, 48)
IMAGE_SLACK_S = 1.0  # a record's hours are float32, accurate to 0.2 s up to 4,000 h
_FIRST_CHANNEL_V = np.cumsum([0, *(len(v.classes) or 1 for v in schema.VARIABLES)])[:-1]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a task's records.

    stays: the cohort. pairs: stay_id, dicom_id, cxr_time of every X-ray. window_h, image_window_h: how many hours after
    `intime` an event or an X-ray may be from, None for the whole stay. timestep_h: hours per time step.
    """

    stays: pl.DataFrame
    arrays: Arrays
    pairs: pl.DataFrame
    window_h: float | None
    image_window_h: float | None
    timestep_h: float


def check(inputs: Inputs, events_dir: Path, predictions: Predictions | None) -> dict:
    """Return counts of what was checked; raise AssertionError on any violation, also under `python -O`.

    predictions: of an hourly task, in which each label is a cut-off of its own.
    """
    los_h_N = inputs.stays["los_h"].to_numpy()[inputs.arrays.row]
    cut_off_h_N = los_h_N if inputs.window_h is None else np.minimum(los_h_N, inputs.window_h)
    stays = inputs.stays[inputs.arrays.row]
    alive_h = ((stays["alive_until"] - stays["intime"]).dt.total_seconds() / 3600.0).fill_null(np.inf)
    last_h_N = np.minimum(cut_off_h_N, alive_h.to_numpy())  # nothing from after death either
    margin_h_N = np.zeros(len(cut_off_h_N))
    wrong_cells = 0
    for bucket in np.unique(inputs.arrays.bucket).tolist():
        positions_S = np.flatnonzero(inputs.arrays.bucket == bucket)
        bucket_events = events.read_bucket(events_dir, bucket)
        latest_s_R, wrong = _check_bucket(inputs, bucket_events, bucket, positions_S, last_h_N[positions_S])
        wrong_cells += wrong
        latest_s_S = np.maximum.reduceat(latest_s_R, inputs.arrays.start[positions_S])
        margin_h_N[positions_S] = cut_off_h_N[positions_S] - latest_s_S / 3600.0
    labels_outside = 0 if predictions is None else _labels_outside(inputs, last_h_N, predictions)
    image_margin_h, late_images = _check_images(inputs, predictions)
    if wrong_cells or labels_outside or late_images:
        raise AssertionError(
            f"{wrong_cells} values of time steps, {labels_outside} labels and {late_images} X-rays are too late"
        )
    cut_off = "the end of the stay"
    if inputs.window_h is not None:
        cut_off = f"{inputs.window_h:g} h, or the end of a shorter stay"
    if inputs.image_window_h != inputs.window_h:
        cut_off += "; of X-rays: the end of the stay"
    return {
        "records": len(inputs.arrays.row),
        "images": len(inputs.pairs),
        "violations": 0,
        "cut_off": cut_off if predictions is None else f"{cut_off} (of each label: its time)",
        "hours_from_latest_event_to_cut_off": describe.histogram(margin_h_N, MARGIN_EDGES_H),
        "hours_from_cxr_to_cut_off": describe.histogram(image_margin_h, MARGIN_EDGES_H),
    }


def _check_bucket(
    inputs: Inputs, bucket_events: pl.DataFrame, bucket: int, positions_S: np.ndarray, last_h_S: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return each time step's latest event in seconds (float64 [R], -1 for none) and the number of wrong cells.

    last_h_S: no event after this hour of a stay may be in its record.
    """
    start_S, length_S = inputs.arrays.start[positions_S], inputs.arrays.length[positions_S]
    first = bucket * events.STAYS_PER_BUCKET
    position_of_stay = np.full(events.STAYS_PER_BUCKET, -1)
    position_of_stay[inputs.arrays.row[positions_S] - first] = np.arange(len(positions_S))
    stay_E = position_of_stay[bucket_events["stay"].to_numpy().astype(np.int64) - first]
    hours_E = bucket_events["time_s"].to_numpy() / 3600.0
    # The benchmark's tolerance, at the ends of stays and time steps.
    admitted_E = (stay_E >= 0) & (hours_E > -EPSILON_H) & (hours_E <= last_h_S[stay_E] + EPSILON_H)
    if "stored_s" in bucket_events.columns:
        stored_h_E = bucket_events["stored_s"].fill_null(0).to_numpy() / 3600.0
        admitted_E &= stored_h_E <= last_h_S[stay_E] + EPSILON_H
    # An event on an edge belongs to the time step that ends there; one at 0, to the first; one that is after the last
    # edge by no more than the tolerance, to the last.
    step_E = np.maximum(np.ceil(hours_E / inputs.timestep_h - EPSILON_H).astype(np.int64) - 1, 0)
    at_last_edge_E = hours_E <= length_S[stay_E] * inputs.timestep_h + EPSILON_H * (1 + inputs.timestep_h)
    admitted_E &= (step_E < length_S[stay_E]) | at_last_edge_E
    row_E = (start_S[stay_E] + np.minimum(step_E, length_S[stay_E] - 1))[admitted_E]

    shape = (int(length_S.sum()), len(schema.VARIABLES))
    low_RV, high_RV = (np.full(shape, extreme, np.float32) for extreme in (np.inf, -np.inf))
    cell_E = row_E * len(schema.VARIABLES) + bucket_events["variable"].to_numpy()[admitted_E]
    value_E = bucket_events["value"].to_numpy()[admitted_E]
    np.minimum.at(low_RV.reshape(-1), cell_E, value_E)
    np.maximum.at(high_RV.reshape(-1), cell_E, value_E)
    latest_s_R = np.full(len(low_RV), -1.0)
    np.maximum.at(latest_s_R, row_E, bucket_events["time_s"].to_numpy()[admitted_E].astype(np.float64))
    ehr_RF = inputs.arrays.of_bucket(bucket)
    assert len(ehr_RF) == len(low_RV)
    return latest_s_R, int(_wrong_cells(ehr_RF, start_S, low_RV, high_RV).sum())


def _wrong_cells(ehr_RF: np.ndarray, start_S: np.ndarray, low_RV: np.ndarray, high_RV: np.ndarray) -> np.ndarray:
    """Return bool [R, V]: True if observed but outside the range of the step's events, or changed but not observed.

    low_RV, high_RV: smallest and largest value of a step's events; inf and -inf without events.
    """
    num_values = len(schema.VALUE_CHANNELS)
    observed_RV = ehr_RF[:, num_values:] > 0
    value_RF = np.asarray(ehr_RF[:, :num_values])
    before_RF = np.concatenate([value_RF[:1], value_RF[:-1]])
    before_RF[start_S] = _defaults()
    changed_RV = np.logical_or.reduceat(value_RF != before_RF, _FIRST_CHANNEL_V, axis=1)
    wrong_RV = changed_RV & ~observed_RV
    for i, (variable, channel) in enumerate(zip(schema.VARIABLES, _FIRST_CHANNEL_V, strict=True)):
        # Rows of one time are averaged, and a mean lies between them. A class is compared by its index.
        value_R = value_RF[:, channel]
        if variable.classes:
            value_R = value_RF[:, channel : channel + len(variable.classes)].argmax(1)
        wrong_RV[:, i] |= observed_RV[:, i] & ((value_R < low_RV[:, i]) | (value_R > high_RV[:, i]))
    return wrong_RV


def _defaults() -> np.ndarray:
    """Return float32 [value channels]: the values before any observation."""
    default_F = np.zeros(len(schema.VALUE_CHANNELS), np.float32)
    for variable, channel in zip(schema.VARIABLES, _FIRST_CHANNEL_V, strict=True):
        if variable.classes:
            default_F[channel + variable.classes.index(variable.default)] = 1.0
        else:
            default_F[channel] = variable.default
    return default_F


def _labels_outside(inputs: Inputs, last_h_N: np.ndarray, predictions: Predictions) -> int:
    """Count labels before the end of the first time step, after the last step, or after the last hour of their stay.

    A label may use the time steps that end by its time, and no step contains an event from after its own end.
    """
    if not len(predictions.position_N):
        return 0
    position_L = np.repeat(predictions.position_N, [len(times) for times in predictions.times])
    time_h_L = np.concatenate(predictions.times).astype(np.float64)
    steps_L = np.floor(time_h_L / inputs.timestep_h + EPSILON_H)  # completed by then (records.py)
    too_many_L = steps_L > inputs.arrays.length[position_L]
    return int(((steps_L < 1) | too_many_L | (time_h_L > last_h_N[position_L] + EPSILON_H)).sum())


def _check_images(inputs: Inputs, predictions: Predictions | None) -> tuple[np.ndarray, int]:
    """Return hours from each X-ray to its stay's cut-off, and how many are outside it or later than recorded."""
    end = pl.min_horizontal("outtime", "alive_until")
    if inputs.image_window_h is not None:
        end = pl.min_horizontal(end, pl.col("intime") + datetime.timedelta(hours=inputs.image_window_h))
    images = inputs.pairs.join(inputs.stays, on="stay_id", maintain_order="left").with_columns(
        image_h=(pl.col("cxr_time") - pl.col("intime")).dt.total_milliseconds() / 3.6e6,
        margin_h=(end - pl.col("cxr_time")).dt.total_milliseconds() / 3.6e6,
    )
    assert len(images) == len(inputs.pairs)
    late = (images["image_h"] < 0) | (images["margin_h"] < 0)
    if predictions is not None:
        # A label uses the X-rays whose recorded hour is at most its own.
        images_of = datasets.images_by_stay(inputs.stays, inputs.pairs)
        recorded = {(stay_id, name): float(hour) for stay_id, of in images_of.items() for name, hour in of}
        keys = images.select("stay_id", "dicom_id").iter_rows()
        recorded_h = pl.Series([recorded[key] for key in keys], dtype=pl.Float64)
        late |= images["image_h"] > recorded_h + IMAGE_SLACK_S / 3600.0
    return images["margin_h"].to_numpy(), int(late.sum())
