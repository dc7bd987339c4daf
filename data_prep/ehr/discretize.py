"""Turn events into regular time steps: an array [T, 76] per stay, for many stays at once.

A time step holds each variable's last value so far (one-hot for classes), then 17 flags for the variables observed in
that step. Before its first observation a variable has its default value.

Shape key: S stays of one bucket, T time steps of one stay, R time steps of all its stays, V 17 variables, F 76
channels.
"""

from pathlib import Path

import numpy as np
import polars as pl

from data_prep import progress
from data_prep.ehr import events
from data_prep.ehr.arrays import EPSILON_H
from data_prep.ehr.cleaning import CLASS_VARIABLES
from data_prep.profiles import Rules
from medfuse_jax import schema

NUM_VARIABLES = len(schema.VARIABLES)
_EVENT_KEY = ["stay", "variable", "time_s"]


def num_steps(period_h: np.ndarray, timestep_h: float) -> np.ndarray:
    """Return how many time steps a period has, at least 1 (rounded as in the benchmark: 48 h make 24 steps of 2 h)."""
    return np.maximum((np.asarray(period_h) / timestep_h + 1.0 - EPSILON_H).astype(np.int64), 1)


def resolve_same_time(bucket: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Reduce the events to one per stay, variable and time, sorted by these; `value` becomes float64.

    If the rule is the mean, an event whose item and value repeat another's is dropped first, and `rows` is the number
    of events in each mean.
    """
    bucket = bucket.with_columns(pl.col("value").cast(pl.Float64))
    is_class = pl.col("variable").is_in(CLASS_VARIABLES)
    if rules.same_time == "mean":
        grouped = _mean_and_last(bucket)
        # Few events share their time with another; only those can be duplicates.
        shared = bucket.join(grouped.filter(pl.col("rows") > 1), on=_EVENT_KEY, how="semi", maintain_order="left")
        distinct = shared.unique([*_EVENT_KEY, "item", "value"], keep="first", maintain_order=True)
        grouped = pl.concat([grouped.filter(pl.col("rows") == 1), _mean_and_last(distinct)])
        value = pl.when(is_class).then("last").otherwise("mean")
        return grouped.select(*_EVENT_KEY, "rows", value=value).sort(_EVENT_KEY)
    assert rules.same_time == "largest", rules.same_time
    order = pl.when(is_class).then(_text_rank()).otherwise(pl.col("value"))
    # `text` is '' except for variables whose numbers are sorted as text.
    ranked = bucket.with_columns(order=pl.when(pl.col("text") == "").then(order).otherwise(0.0))
    ranked = ranked.sort([*_EVENT_KEY, "text", "order"])
    return ranked.unique(_EVENT_KEY, keep="last", maintain_order=True).select(*_EVENT_KEY, "value")


def _mean_and_last(bucket: pl.DataFrame) -> pl.DataFrame:
    value = pl.col("value")
    return bucket.group_by(_EVENT_KEY, maintain_order=True).agg(mean=value.mean(), last=value.last(), rows=pl.len())


def _text_rank() -> pl.Expr:
    """Rank each class among its variable's classes, sorted as text."""
    rank = pl.lit(0.0)
    for variable in CLASS_VARIABLES:
        classes = schema.VARIABLES[variable].classes
        rank_of = {float(classes.index(text)): float(i) for i, text in enumerate(sorted(classes))}
        ranks = pl.col("value").replace_strict(rank_of, default=None, return_dtype=pl.Float64)
        rank = pl.when(pl.col("variable") == variable).then(ranks).otherwise(rank)
    return rank


def discretize(bucket: pl.DataFrame, first_stay: int, period_h: np.ndarray, timestep_h: float):
    """Turn the events of consecutive stays into time steps.

    bucket: events from `resolve_same_time`, of stays first_stay ... first_stay + S - 1; those after a stay's period
        are dropped.
    period_h: float [S], hours of each stay that the task may see.
    Returns (ehr float32 [R, 76], length int64 [S], time int64 [S] of the latest event used: seconds, -1 for none).
    """
    length_S = num_steps(period_h, timestep_h)
    start_S = np.cumsum(length_S) - length_S
    stay = bucket["stay"].to_numpy().astype(np.int64) - first_stay
    hours = bucket["time_s"].to_numpy() / 3600.0
    inside = (hours > -EPSILON_H) & (hours < np.asarray(period_h)[stay] + EPSILON_H)
    stay, hours = stay[inside], hours[inside]
    variable = bucket["variable"].to_numpy()[inside]
    # Truncate, do not floor: an event at the start belongs to step 0, one on an edge to the step that ends there.
    step = np.minimum((hours / timestep_h - EPSILON_H).astype(np.int64), length_S[stay] - 1)
    assert ((step >= 0) & (step < length_S[stay])).all(), "an event would be written to another stay"
    row = start_S[stay] + step
    value_RV = np.zeros((int(length_S.sum()), NUM_VARIABLES))
    observed_RV = np.zeros(value_RV.shape, bool)
    # Events are sorted by time within stay and variable, and the last write wins, so a step keeps its last event.
    value_RV[row, variable] = bucket["value"].to_numpy()[inside]
    observed_RV[row, variable] = True
    _carry_forward(value_RV, observed_RV, np.repeat(start_S, length_S))
    last_S = np.full(len(length_S), -1, np.int64)
    np.maximum.at(last_S, stay, bucket["time_s"].to_numpy()[inside])
    return _channels(value_RV, observed_RV), length_S, last_S


def _carry_forward(value_RV: np.ndarray, observed_RV: np.ndarray, start_R: np.ndarray) -> None:
    """Fill unobserved values in place: with the variable's last value in the stay, or else its default."""
    row_R = np.arange(len(value_RV))
    for i, variable in enumerate(schema.VARIABLES):
        source_R = np.maximum.accumulate(np.where(observed_RV[:, i], row_R, -1))
        default = variable.classes.index(variable.default) if variable.classes else variable.default
        value_RV[:, i] = np.where(source_R >= start_R, value_RV[source_R, i], default)


def _channels(value_RV: np.ndarray, observed_RV: np.ndarray) -> np.ndarray:
    """Lay out values and observation flags as the 76 channels."""
    ehr_RF = np.zeros((len(value_RV), len(schema.CHANNELS)), np.float32)
    row_R, channel = np.arange(len(value_RV)), 0
    for i, variable in enumerate(schema.VARIABLES):
        if variable.classes:
            ehr_RF[row_R, channel + value_RV[:, i].astype(np.int64)] = 1.0
            channel += len(variable.classes)
        else:
            ehr_RF[:, channel] = value_RV[:, i]
            channel += 1
    ehr_RF[:, channel:] = observed_RV
    return ehr_RF


def write_arrays(
    folder: Path, events_dir: Path, stays: pl.DataFrame, rules: Rules, task: schema.Task, timestep_h: float
) -> None:
    """Write a task's arrays: a file `ehr_<bucket>.npy` [R, 76] per bucket, and `index.npz`.

    index.npz holds, for each stay that is long enough and has an event: row (in the cohort), bucket, start (first row
    in the bucket's file), length, first_step (the first with an observation). It also holds four totals (see
    `Arrays`).
    """
    los_h = stays["los_h"].to_numpy()
    window_h = rules.window_h(task)
    period_h = los_h if window_h is None else np.minimum(los_h, window_h)
    # If the task sets the window, a stay must be at least that long; if only the profile does, it may be shorter.
    long_enough = los_h > (task.window_h or 0.0) - EPSILON_H
    num_long_enough = int(long_enough.sum())
    died = died_in_window(stays, window_h) & long_enough
    if not rules.deaths_in_window:
        long_enough &= ~died
    index = {name: [] for name in ("row", "bucket", "start", "length", "first_step")}
    num_stored_late = num_duplicates = 0
    for bucket in progress.bar(range(events.num_buckets(len(stays))), f"arrays of {task.name}", "buckets"):
        bucket_events = events.read_bucket(events_dir, bucket)
        if bucket_events is None:
            continue
        first = bucket * events.STAYS_PER_BUCKET
        rows = slice(first, first + events.STAYS_PER_BUCKET)
        if rules.stored_in_time:
            bucket_events, late = _stored_in_time(bucket_events, first, period_h[rows], long_enough[rows])
            num_stored_late += late
        resolved = resolve_same_time(bucket_events, rules)
        if rules.same_time == "mean":
            num_duplicates += len(bucket_events) - int(resolved["rows"].sum())
        ehr_RF, length_S, last_S = discretize(resolved, first, period_h[rows], timestep_h)
        kept_S = long_enough[rows] & (last_S >= 0)
        ehr_RF = ehr_RF[np.repeat(kept_S, length_S)]
        np.save(folder / f"ehr_{bucket:05d}.npy", ehr_RF)
        kept_length = length_S[kept_S]
        index["row"].append(first + np.flatnonzero(kept_S))
        index["bucket"].append(np.full(len(kept_length), bucket))
        index["start"].append(np.cumsum(kept_length) - kept_length)
        index["length"].append(kept_length)
        index["first_step"].append(_first_observed(ehr_RF, kept_length))
    joined = {name: np.concatenate(parts or [np.zeros(0)]).astype(np.int64) for name, parts in index.items()}
    totals = {"num_stored_late": num_stored_late, "num_duplicates": num_duplicates}
    totals |= {"num_long_enough": num_long_enough, "num_died": int(died.sum())}
    np.savez(folder / "index.npz", **joined, **totals)


def died_in_window(stays: pl.DataFrame, window_h: float | None) -> np.ndarray:
    """Return bool [N]: whether the patient died before the end of the window; all False without one."""
    died_h = (stays["alive_until"] - stays["intime"]).dt.total_seconds().fill_null(np.iinfo(np.int64).max) / 3600.0
    return died_h.to_numpy() < (window_h or 0.0)


def _stored_in_time(bucket: pl.DataFrame, first_stay: int, period_h: np.ndarray, counted_S: np.ndarray):
    """Drop events stored after their stay's period; keep those without a storetime.

    counted_S: bool [S], the stays to count in. Returns (kept events, number of dropped events that lie in the period).
    """
    stay = bucket["stay"].to_numpy().astype(np.int64) - first_stay
    end_s = (period_h[stay] + EPSILON_H) * 3600.0
    late = (bucket["stored_s"] > end_s).fill_null(False).to_numpy()
    return bucket.filter(~late), int((late & (bucket["time_s"].to_numpy() <= end_s) & counted_S[stay]).sum())


def _first_observed(ehr_RF: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """Return int64 [S]: each stay's first time step with an observation."""
    start_S = np.cumsum(length_S) - length_S
    observed_R = (ehr_RF[:, len(schema.VALUE_CHANNELS) :] > 0).any(1)
    row_R = np.where(observed_R, np.arange(len(ehr_RF)), len(ehr_RF))
    return np.minimum.reduceat(row_R, start_S) - start_S if len(start_S) else start_S
