"""Bedside and laboratory events of synthetic stays, driven by their vital latents.

Each latent shifts the level of one or two variables for the whole stay (for blood pressure and awareness the shift
builds up during the first day), on top of the patient's own baseline and noise. The rows have the quirks of the real
tables: several items per variable, mixed units, texts, gaps, rows outside the stay, wrong values.

`stays` is the frame of `cohort.draw_stays`; `at` [2, R]: the row of the stay in that frame, minutes since its intime.
"""

import dataclasses
import functools

import numpy as np
import polars as pl

from data_prep.synthetic.signal import VITAL_LATENTS

WAVE_SHARE = 0.8  # amplitude of a signal's slow wave, as a fraction of its noise_sd
READING_SHARE = 0.8  # standard deviation of each reading around it, as a fraction of noise_sd
MISREAD_SHARE = 1 / 20_000  # of numeric bedside rows: a slipped decimal point


@dataclasses.dataclass(frozen=True)
class Signal:
    """One variable over time: base + shift by the latents + the patient's offset + noise."""

    base: float
    shifts: dict[str, float]
    patient_sd: float
    noise_sd: float
    grows: bool = False  # the shift builds up during the first 24 h

    def growth(self, hours: np.ndarray) -> np.ndarray | float:
        """Return the fraction of the shift that shows after so many hours of the stay."""
        return 0.4 + 0.6 * np.clip(hours / 24, 0, 1) if self.grows else 1.0


SIGNALS = {
    "heart_rate": Signal(86, {"tachycardia": 13}, 4, 7),
    "systolic": Signal(120, {"hypotension": -15}, 4, 8, grows=True),
    "diastolic": Signal(62, {"hypotension": -8}, 2.5, 5, grows=True),
    "respiratory_rate": Signal(20, {"tachypnoea": 4}, 1.2, 2.5),
    "saturation": Signal(95.5, {"hypoxaemia": -1.7}, 0.5, 1),
    "oxygen_percent": Signal(45, {"hypoxaemia": 9}, 3, 3),
    "temperature_c": Signal(37.1, {"fever": 0.55}, 0.15, 0.25),
    "log_glucose": Signal(4.95, {"hyperglycaemia": 0.3}, 0.08, 0.15),
    "ph": Signal(7.37, {"acidosis": -0.055}, 0.014, 0.02),
    "awareness": Signal(0.4, {"coma": -1.3}, 0.3, 0.35, grows=True),
}

# Item -> answers, best first: smallest awareness, MIMIC-IV's spelling, the older spelling, points.
GCS = {
    220739: (
        (0.3, "Spontaneously", "4 Spontaneously", 4),
        (-0.6, "To Speech", "3 To speech", 3),
        (-1.4, "To Pain", "2 To pain", 2),
        (-np.inf, "None", "1 No Response", 1),
    ),
    223900: (
        (0.6, "Oriented", "5 Oriented", 5),
        (0.0, "Confused", "4 Confused", 4),
        (-0.4, "Inappropriate Words", "3 Inapprop words", 3),
        (-1.0, "Incomprehensible sounds", "2 Incomp sounds", 2),
        (-np.inf, "No Response", "1 No Response", 1),
    ),
    223901: (
        (-0.5, "Obeys Commands", "6 Obeys Commands", 6),
        (-1.1, "Localizes Pain", "5 Localizes Pain", 5),
        (-1.6, "Flex-withdraws", "4 Flex-withdraws", 4),
        (-1.9, "Abnormal Flexion", "3 Abnorm flexion", 3),
        (-2.3, "Abnormal extension", "2 Abnorm extensn", 2),
        (-np.inf, "No response", "1 No Response", 1),
    ),
}
ETT = {False: "No Response-ETT", True: "1.0 ET/Trach"}  # old spelling -> answer of an intubated patient


def as_text(values: np.ndarray, digits: int) -> pl.Series:
    """Format numbers as the real tables do: `77`, `36.6`."""
    return pl.Series(np.round(values, digits) + 0.0).cast(pl.String).str.strip_suffix(".0")


def draw_courses(rng: np.random.Generator, vitals_NV: np.ndarray) -> dict[str, tuple]:
    """Draw for each signal: baseline, shift, and the period (h) and phase of a slow wave, each [N]."""
    num = len(vitals_NV)
    courses = {}
    for name, signal in SIGNALS.items():
        gain = np.array([signal.shifts.get(latent, 0.0) for latent in VITAL_LATENTS])
        baseline = signal.base + signal.patient_sd * rng.standard_normal(num)
        courses[name] = (baseline, vitals_NV @ gain, rng.uniform(8, 30, num), rng.uniform(0, 2 * np.pi, num))
    return courses


def _read(rng, courses, name: str, at) -> np.ndarray:
    """Return the values [R] of one signal."""
    row, hours = at[0], at[1] / 60
    signal = SIGNALS[name]
    baseline, shift, period_h, phase = (part[row] for part in courses[name])
    wave = WAVE_SHARE * np.sin(2 * np.pi * hours / period_h + phase)
    noise = wave + READING_SHARE * rng.standard_normal(len(row))
    return baseline + shift * signal.growth(hours) + signal.noise_sd * noise


def _hourly(rng: np.random.Generator, los_h: np.ndarray) -> np.ndarray:
    """Return charting times [2, R]: about one an hour, most of a stay's at the same minute past the hour."""
    count = np.ceil(los_h).astype(int)
    row = np.repeat(np.arange(len(los_h)), count)
    hour = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    offset = rng.integers(1, 59, len(los_h))[row]
    past_hour = np.where(rng.random(len(row)) < 0.3, rng.integers(0, 59, len(row)), offset)
    minute = np.minimum(hour * 60 + past_hour, (los_h[row] * 60).astype(int) - 1)
    first, last = hour == 0, hour == count[row] - 1
    minute = np.where(first & (rng.random(len(row)) < 0.05), -20, minute)  # charted before arrival ...
    return np.stack([row, np.where(last & (rng.random(len(row)) < 0.05), minute + 90, minute)])  # ... and after leaving


def _rows(item: int, at, value, unit: str | None, number=None, comment: str | None = None) -> pl.DataFrame:
    """Return rows of one item; number: valuenum, if it differs from `value`."""
    value = pl.lit(value, pl.String) if value is None or isinstance(value, str) else value
    frame = pl.DataFrame({"row": at[0].astype(np.int32), "minute": at[1].astype(np.int32)})
    return frame.with_columns(
        pl.lit(item, pl.Int32).alias("itemid"),
        value.alias("value"),
        (value if number is None else number).alias("valuenum"),
        pl.lit(unit, pl.String).alias("valueuom"),
        pl.lit(comment, pl.String).alias("comments"),
    )


def _ordered(frames: list[pl.DataFrame], stays: pl.DataFrame) -> pl.DataFrame:
    """Sort all rows by stay, time and item; stays of kind 'empty' keep only the heart rhythm (220048)."""
    rows = pl.concat(frames)
    usable = (stays["kind"] != "empty").to_numpy()[rows["row"].to_numpy()]
    return rows.filter(pl.Series(usable) | (rows["itemid"] == 220048)).sort(
        "row", "minute", "itemid", maintain_order=True
    )


def _some(rng, at, share):
    """Return a random share of the times; share: one number, or one per time."""
    return at[:, rng.random(at.shape[1]) < share]


def _every(at, hours: int):
    """Return the times every `hours` hours, starting at a different hour in each stay."""
    return at[:, (at[1] // 60 + at[0]) % hours == 0]


def _of(at, stays_mask: np.ndarray):
    return at[:, stays_mask[at[0]]]


def _vitals(rng, add, read, hourly, ventilated) -> None:
    """Add heart rate, breathing, oxygen and temperature with `add(item, at, values, digits, unit)`."""
    num = len(ventilated)
    at = _some(rng, hourly, 0.97)
    add(220045, at, read("heart_rate", at), 0, "bpm")
    at = _some(rng, hourly, 0.97)
    add(220210, at, read("respiratory_rate", at), 0, "insp/min")
    at = _of(_every(hourly, 4), ventilated)
    add(224690, at, read("respiratory_rate", at), 0, "insp/min")
    at = _some(rng, at, 0.2)
    add(224689, at, read("respiratory_rate", at) * 0.9, 0, "insp/min")
    at = _some(rng, hourly, 0.005)
    add(224422, at, read("respiratory_rate", at), 0, "bpm")
    at = _some(rng, hourly, 0.96)
    add(220277, at, np.minimum(read("saturation", at), 100), 0, "%")
    at = _some(rng, hourly, 0.01)
    add(220227, at, np.minimum(read("saturation", at), 100), 0, "%")
    at = _of(_every(hourly, 4), ventilated)
    percent = np.clip(read("oxygen_percent", at) // 5 * 5, 21, 100)
    as_fraction = rng.random(len(percent)) < 0.1
    add(223835, at, np.where(as_fraction, percent / 100, percent), 2, None)
    celsius = rng.random(num) < 0.12
    at = _of(_every(hourly, 4), celsius)
    add(223762, at, read("temperature_c", at), 1, "°C")
    at = _of(_every(hourly, 4), ~celsius)
    degrees = read("temperature_c", at)
    wrong_unit = rng.random(len(degrees)) < 0.002  # Celsius charted under the Fahrenheit item, as in the real table
    add(223761, at, np.where(wrong_unit, degrees, degrees * 1.8 + 32), 1, "°F")


def _pressures(rng, add, read, hourly, num: int) -> None:
    """Add blood pressure from the cuff, the arterial line (two sets of items), manual readings and a balloon pump."""
    arterial = rng.random(num) < 0.45
    second_line = rng.random(num) < 0.1
    at_cuff = _some(rng, hourly, np.where(arterial, 0.3, 0.95)[hourly[0]])
    sets = [
        ((220179, 220180, 220181), at_cuff),
        ((220050, 220051, 220052), _some(rng, _of(hourly, arterial & ~second_line), 0.95)),
        ((225309, 225310, 225312), _some(rng, _of(hourly, arterial & second_line), 0.95)),
    ]
    for (item_systolic, item_diastolic, item_mean), at in sets:
        systolic, diastolic = read("systolic", at), read("diastolic", at)
        add(item_systolic, at, systolic, 0, "mmHg")
        add(item_diastolic, at, diastolic, 0, "mmHg")
        add(item_mean, at, diastolic + (systolic - diastolic) / 3 + rng.normal(0, 2, len(systolic)), 0, "mmHg")
    at = _some(rng, hourly, 0.002)
    add(224167, at, read("systolic", at), 0, "mmHg")
    add(224643, at, read("diastolic", at), 0, "mmHg")
    at = _some(rng, hourly, 0.001)
    add(227243, at, read("systolic", at), 0, "mmHg")
    at = _of(hourly, np.arange(num) % 200 == 3)
    add(224322, at, read("diastolic", at) + 18, 0, "mmHg")


def _bedside_labs(rng, add, read, hourly, num: int) -> None:
    """Add the bedside chart's glucose and pH."""
    for item, hours, share, unit in ((225664, 6, 0.7, None), (220621, 12, 0.9, "mg/dL"), (226537, 8, 0.1, "mg/dL")):
        at = _of(_every(hourly, hours), rng.random(num) < share)
        add(item, at, np.exp(read("log_glucose", at)), 0, unit)
    for item, share in ((223830, 0.6), (220274, 0.05)):
        at = _of(_every(hourly, 8), rng.random(num) < share)
        add(item, at, read("ph", at), 2, "units")


def _body(rng, add, stays: pl.DataFrame, hourly) -> None:
    """Add height in inches and centimetres, and weight in kilograms and pounds."""
    num = len(stays)
    male = (stays["gender"] == "M").to_numpy()
    height_cm = rng.normal(np.where(male, 176, 163), 7)
    weight_kg = rng.normal(28, 5, num).clip(16) * (height_cm / 100) ** 2
    start = np.flatnonzero(np.diff(hourly[0], prepend=-1))
    first = np.maximum(hourly[:, start], 0)
    at = _some(rng, first, 0.5)
    inches = np.round(height_cm[at[0]] / 2.54)
    misread = rng.random(len(inches)) < 0.003
    add(226707, at, np.where(misread, inches * 10, inches), 0, "Inch")
    add(226730, at, np.round(inches * 2.54), 0, "cm")
    at = _some(rng, first, 0.9)
    add(226512, at, weight_kg[at[0]], 1, "kg")
    add(226531, at, weight_kg[at[0]] / 0.453592, 1, None)
    at = _every(_of(hourly, rng.random(num) < 0.6), 24)
    add(224639, at, weight_kg[at[0]] + rng.normal(0, 1, len(at[0])), 1, "kg")


def _texts(rng, read, hourly, ventilated) -> list[pl.DataFrame]:
    """Return rows of the coma scale, capillary refill and heart rhythm."""
    frames, no_number = [], pl.lit(None, pl.String)
    num = len(ventilated)
    old_spelling = rng.random(num) < 0.05
    at = _some(rng, _every(hourly, 4), 0.97)
    row, awareness = at[0], read("awareness", at)
    for item, answers in GCS.items():
        level = awareness + rng.normal(0, 0.15, len(row))
        slot = np.argmax(level[:, None] >= np.array([least for least, *_ in answers]), axis=1)
        spellings = np.array([[new, old] for _, new, old, _ in answers], dtype=object)
        text = spellings[slot, old_spelling[row].astype(int)]
        number = np.array([points for *_, points in answers])[slot]
        if item == 223900:
            text = np.where(ventilated[row], np.array([ETT[bool(old)] for old in old_spelling], object)[row], text)
            number = np.where(ventilated[row], 1, number)
        frames.append(_rows(item, at, pl.Series(text.astype(str)), None, as_text(number, 0)))
    at = _every(hourly, 8)
    slow = read("systolic", at) < 92
    refill = pl.Series(np.where(slow, "Abnormal >3 Seconds", "Normal <3 Seconds"))
    for item in (223951, 224308):
        frames.append(_rows(item, at, refill, None, no_number))
    at = _every(hourly, 4)
    rhythm = np.where(read("heart_rate", at) > 100, "ST (Sinus Tachycardia)", "SR (Sinus Rhythm)")
    return [*frames, _rows(220048, at, pl.Series(rhythm), None, no_number)]


def chart_rows(rng: np.random.Generator, stays: pl.DataFrame, courses: dict) -> pl.DataFrame:
    """Return the bedside rows: row (of the stay), minute (since intime), itemid, value, valuenum, valueuom."""
    hourly = _hourly(rng, stays["los_h"].to_numpy())
    frames = []
    read = functools.partial(_read, rng, courses)

    def add(item, at, values, digits, unit):
        values = np.where(rng.random(len(values)) < MISREAD_SHARE, values * 10, np.maximum(values, 0))
        frames.append(_rows(item, at, as_text(values, digits), unit))

    ventilated = rng.random(len(stays)) < 0.35
    _vitals(rng, add, read, hourly, ventilated)
    _pressures(rng, add, read, hourly, len(stays))
    _bedside_labs(rng, add, read, hourly, len(stays))
    _body(rng, add, stays, hourly)
    frames += _texts(rng, read, hourly, ventilated & (rng.random(len(stays)) < 0.5))
    return _ordered(frames, stays)


def lab_rows(rng: np.random.Generator, stays: pl.DataFrame, courses: dict) -> pl.DataFrame:
    """Return the laboratory rows, from 8 h before the stay on, with the columns of `chart_rows` and comments."""
    hourly = _hourly(rng, stays["los_h"].to_numpy() + 8) - [[0], [8 * 60]]
    frames = []
    read = functools.partial(_read, rng, courses)

    def add(item, at, values, digits, unit):
        frames.append(_rows(item, at, as_text(values, digits), unit))

    at = _every(hourly, 8)  # the published tables blank these texts, not the numbers
    fasting = "IF FASTING, 70-100 NORMAL, >125 PROVISIONAL DIABETES."
    frames.append(_rows(50931, at, "___", "mg/dL", as_text(np.exp(read("log_glucose", at)), 0), fasting))
    at = _of(at, rng.random(len(stays)) < 0.9)  # blood gases
    add(50820, at, read("ph", at), 2, "units")
    add(50809, at, np.exp(read("log_glucose", at)), 0, "mg/dL")
    at = _some(rng, at, 0.3)
    add(50817, at, np.minimum(read("saturation", at), 100), 0, "%")
    add(50813, at, rng.lognormal(0.5, 0.4, len(at[0])), 1, "mmol/L")
    at = _every(hourly, 24)
    add(50912, at, rng.lognormal(0.1, 0.4, len(at[0])), 1, "mg/dL")
    add(51222, at, rng.normal(10.5, 1.5, len(at[0])), 1, "g/dL")
    at = _some(rng, at, 0.02)  # urine and other fluids
    add(51491, at, rng.choice([5.0, 5.5, 6.0, 6.5, 7.0], len(at[0])), 1, "units")
    frames.append(_rows(51478, at, None, "mg/dL", comment="NEG."))
    at = at[:, :3]
    add(51094, at, np.full(len(at[0]), 5.0), 0, None)
    frames.append(_rows(50831, at, as_text(np.full(len(at[0]), 7.4), 2), "units", comment="PLEURAL FLUID."))
    return _ordered(frames, stays)


def output_rows(rng: np.random.Generator, stays: pl.DataFrame) -> pl.DataFrame:
    """Return urine output every other hour, with the columns of `chart_rows`."""
    at = _every(_hourly(rng, stays["los_h"].to_numpy()), 2)
    return _ordered([_rows(226559, at, as_text(rng.gamma(2, 60, len(at[0])) // 5 * 5, 0), "ml")], stays)
