"""Events to regular steps: one array [T, 76] a stay, made for many stays at once.

A step holds each variable's last value so far, one-hot where it has classes, then 17 flags for
what was observed in that very step. Values before the first observation are the variables' defaults.

Shape key: S stays, T steps of one stay, R steps of all stays together, V 17 variables, F 76 channels.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from data_prep import progress
from data_prep.ehr import events
from data_prep.ehr.cohort import window_h
from data_prep.ehr.events import EPSILON_H
from data_prep.profiles import Rules
from medfuse_jax import schema

NUM_VARIABLES = len(schema.VARIABLES)


def num_steps(period_h: np.ndarray, timestep_h: float) -> np.ndarray:
    """How many steps a period has, at least 1 (the benchmark's rounding: 48 h at 2 h are 24)."""
    return np.maximum((np.asarray(period_h) / timestep_h + 1.0 - EPSILON_H).astype(np.int64), 1)


def resolve_same_time(found: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """One event a stay, variable and time, sorted by them; `value` stays float64 here.

    A row given twice counts once: it would weigh twice in a mean. (The largest is the same without it.) Of a mean,
    `rows` says how many it is of.
    """
    keys = ["stay", "variable", "time_s"]
    found = found.with_columns(pl.col("value").cast(pl.Float64))
    is_class = pl.col("variable").is_in([place for place, v in enumerate(schema.VARIABLES) if v.classes])
    if rules.same_time == "mean":
        grouped = _mean_and_last(found, keys)
        # Few rows share a minute, and only they can be there twice.
        shared = found.join(grouped.filter(pl.col("rows") > 1), on=keys, how="semi", maintain_order="left")
        once = shared.unique([*keys, "item", "value"], keep="first", maintain_order=True)
        grouped = pl.concat([grouped.filter(pl.col("rows") == 1), _mean_and_last(once, keys)])
        return grouped.select(*keys, "rows", value=pl.when(is_class).then("last").otherwise("mean")).sort(keys)
    assert rules.same_time == "largest", rules.same_time
    order = pl.when(is_class).then(_text_rank()).otherwise(pl.col("value"))
    # `text` is empty but for the variables whose numbers sort as text.
    ranked = found.with_columns(order=pl.when(pl.col("text") == "").then(order).otherwise(0.0))
    ranked = ranked.sort([*keys, "text", "order"])
    return ranked.unique(keys, keep="last", maintain_order=True).select(*keys, "value")


def _mean_and_last(found: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    value = pl.col("value")
    return found.group_by(keys, maintain_order=True).agg(mean=value.mean(), last=value.last(), rows=pl.len())


def _text_rank() -> pl.Expr:
    """A class's place among the sorted texts of its variable."""
    rank = pl.lit(0.0)
    for place, variable in enumerate(schema.VARIABLES):
        if variable.classes:
            of_text = {float(variable.classes.index(text)): float(i) for i, text in enumerate(sorted(variable.classes))}
            ranks = pl.col("value").replace_strict(of_text, default=None, return_dtype=pl.Float64)
            rank = pl.when(pl.col("variable") == place).then(ranks).otherwise(rank)
    return rank


def discretize(found: pl.DataFrame, first_stay: int, period_h: np.ndarray, timestep_h: float):
    """Events of consecutive stays to steps.

    found: stay, variable, time_s, value, as `resolve_same_time` gives them, of the stays
        first_stay ... first_stay + S - 1; those later than a stay's period are left out.
    period_h: float [S], hours each stay lasts as far as this task may see.
    Returns (ehr float32 [R, 76], length int64 [S], int64 [S]: seconds of the latest event used, -1 for none).
    """
    length_S = num_steps(period_h, timestep_h)
    start_S = np.cumsum(length_S) - length_S
    stay = found["stay"].to_numpy().astype(np.int64) - first_stay
    hours = found["time_s"].to_numpy() / 3600.0
    inside = (hours > -EPSILON_H) & (hours < np.asarray(period_h)[stay] + EPSILON_H)
    stay, hours = stay[inside], hours[inside]
    variable = found["variable"].to_numpy()[inside]
    # Truncation, not floor: an event at the very start falls in step 0; one on an edge in the step it ends.
    step = np.minimum((hours / timestep_h - EPSILON_H).astype(np.int64), length_S[stay] - 1)
    # Any other would be a step of another patient.
    assert ((step >= 0) & (step < length_S[stay])).all()
    row = start_S[stay] + step
    value_RV = np.zeros((int(length_S.sum()), NUM_VARIABLES))
    observed_RV = np.zeros(value_RV.shape, bool)
    # Events come sorted by time within stay and variable, and of several writes to one place the last
    # stays: the last event of a step wins.
    value_RV[row, variable] = found["value"].to_numpy()[inside]
    observed_RV[row, variable] = True
    _carry_forward(value_RV, observed_RV, np.repeat(start_S, length_S))
    last_S = np.full(len(length_S), -1, np.int64)
    np.maximum.at(last_S, stay, found["time_s"].to_numpy()[inside])
    return _channels(value_RV, observed_RV), length_S, last_S


def _carry_forward(value_RV: np.ndarray, observed_RV: np.ndarray, start_R: np.ndarray) -> None:
    """Fills what was not observed with the stay's last value before it, or the default; in place."""
    row_R = np.arange(len(value_RV))
    for place, variable in enumerate(schema.VARIABLES):
        source_R = np.maximum.accumulate(np.where(observed_RV[:, place], row_R, -1))
        default = variable.classes.index(variable.default) if variable.classes else variable.default
        value_RV[:, place] = np.where(source_R >= start_R, value_RV[source_R, place], default)


def _channels(value_RV: np.ndarray, observed_RV: np.ndarray) -> np.ndarray:
    """Values and observation flags to the 76 channels."""
    ehr_RF = np.zeros((len(value_RV), len(schema.CHANNELS)), np.float32)
    row_R, channel = np.arange(len(value_RV)), 0
    for place, variable in enumerate(schema.VARIABLES):
        if variable.classes:
            ehr_RF[row_R, channel + value_RV[:, place].astype(np.int64)] = 1.0
            channel += len(variable.classes)
        else:
            ehr_RF[:, channel] = value_RV[:, place]
            channel += 1
    ehr_RF[:, channel:] = observed_RV
    return ehr_RF


def write_arrays(
    folder: Path, events_dir: Path, stays: pl.DataFrame, rules: Rules, task: schema.Task, timestep_h: float
) -> None:
    """Writes a task's arrays, a file `ehr_<bucket>.npy` [R, 76] a bucket, and `index.npz`.

    index.npz: row (of the cohort), bucket, start (first step in the bucket's file), length
    and first_step (the first with an observation), of the stays that are long enough and have an event.
    """
    los_h = stays["los_h"].to_numpy()
    window = window_h(task, rules.pheno_window_h)
    period_h = los_h if window is None else np.minimum(los_h, window)
    # A fixed window that is the task's own needs stays at least that long; a profile's cut does not.
    long_enough = los_h > (task.window_h or 0.0) - EPSILON_H
    index = {name: [] for name in ("row", "bucket", "start", "length", "first_step")}
    num_stored_late = num_given_twice = 0
    buckets = range(events.num_buckets(len(stays)))
    for bucket in progress.bar(buckets, f"arrays of {task.name}", "buckets"):
        found = events.read_bucket(events_dir, bucket)
        if found is None:
            continue
        first = bucket * events.STAYS_PER_BUCKET
        rows = slice(first, first + events.STAYS_PER_BUCKET)
        if rules.stored_in_time:
            found, late = _stored_in_time(found, first, period_h[rows], long_enough[rows])
            num_stored_late += late
        resolved = resolve_same_time(found, rules)
        if rules.same_time == "mean":
            num_given_twice += len(found) - int(resolved["rows"].sum())
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
    joined |= {"num_long_enough": int(long_enough.sum()), "num_stored_late": num_stored_late}
    np.savez(folder / "index.npz", num_given_twice=num_given_twice, **joined)


def _stored_in_time(found: pl.DataFrame, first_stay: int, period_h: np.ndarray, counts_S: np.ndarray):
    """The events stored by the end of their stay's period, or at no known time; and how many of it were stored later.

    counts_S: bool [S], the stays whose events are counted.
    """
    stay = found["stay"].to_numpy().astype(np.int64) - first_stay
    end_s = (period_h[stay] + EPSILON_H) * 3600.0
    late = (found["stored_s"] > end_s).fill_null(False).to_numpy()
    return found.filter(~late), int((late & (found["time_s"].to_numpy() <= end_s) & counts_S[stay]).sum())


def _first_observed(ehr_RF: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """int64 [S]: the first step of each stay in which anything was observed."""
    start_S = np.cumsum(length_S) - length_S
    observed_R = (ehr_RF[:, len(schema.VALUE_CHANNELS) :] > 0).any(1)
    row_R = np.where(observed_R, np.arange(len(ehr_RF)), len(ehr_RF))
    return np.minimum.reduceat(row_R, start_S) - start_S if len(start_S) else start_S


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A task's arrays as `write_arrays` left them: row, length, first_step [N], and `of(i)`."""

    folder: Path
    row: np.ndarray
    bucket: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first_step: np.ndarray
    num_long_enough: int
    num_stored_late: int  # events of the time seen that were stored after it
    num_given_twice: int  # events of the cohort that were not averaged, because another is of the same item and value

    @classmethod
    def open(cls, folder: Path) -> "Arrays":
        with np.load(folder / "index.npz") as stored:
            return cls(folder, **{name: stored[name] if stored[name].ndim else int(stored[name]) for name in stored})

    def of(self, i: int) -> np.ndarray:
        """ehr [T, 76] of the i-th stay."""
        # Opened anew for each stay, so that what was read does not stay mapped in memory.
        bucket = np.load(self.folder / f"ehr_{self.bucket[i]:05d}.npy", mmap_mode="r")
        return np.asarray(bucket[self.start[i] : self.start[i] + self.length[i]])

    def buckets(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ehr [R, 76], first row of each of its stays) of one bucket after another."""
        for bucket in np.unique(self.bucket).tolist():
            stored = np.load(self.folder / f"ehr_{bucket:05d}.npy", mmap_mode="r")
            yield stored, self.start[self.bucket == bucket]
