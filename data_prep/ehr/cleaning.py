"""Convert raw values to numbers in the variable's unit or to class indices, and drop invalid ones."""

import polars as pl

from data_prep.profiles import Rules
from data_prep.raw import parse
from medfuse_jax import schema

VARIABLE = {variable.name: index for index, variable in enumerate(schema.VARIABLES)}
CLASS_VARIABLES = [index for index, variable in enumerate(schema.VARIABLES) if variable.classes]

HEIGHT_INCH, TEMPERATURE_F, WEIGHT_LB = 226707, 223761, 226531  # items that are not in their variable's unit
KG_PER_LB, CM_PER_INCH = 0.453592, 2.54

NO_VALUE, IMPOSSIBLE = "no valid value", "impossible value"  # fates of a row

# Text of a row -> class, for texts that are not class names.
CAPILLARY_TEXT = {"Normal <3 Seconds": "0.0", "Abnormal >3 Seconds": "1.0"}

# Plausible ranges (drop below, clip to, clip to, drop above). Source: resources/variable_ranges.csv of the benchmark
# that the paper builds on (arXiv 1703.07771); the benchmark's own extraction no longer applies them.
RANGES = {
    "Diastolic blood pressure": (0, 0, 375, 375),
    "Fraction inspired oxygen": (0.2, 0.21, 1, 1.1),
    "Glucose": (0, 33, 2000, 2200),
    "Heart Rate": (0, 0, 350, 390),
    "Height": (0, 0, 240, 275),
    "Mean blood pressure": (0, 14, 330, 375),
    "Oxygen saturation": (0, 0, 100, 150),
    "Respiratory rate": (0, 0, 300, 330),
    "Systolic blood pressure": (0, 0, 375, 375),
    "Temperature": (14.2, 26, 45, 47),
    "Weight": (0, 0, 250, 250),
    "pH": (6.3, 6.3, 8.4, 10),
}


def clean(frame: pl.DataFrame, rules: Rules) -> pl.DataFrame:
    """Add `value` (float64), `clipped`, and `fate`: why a row is dropped, or null.

    frame: variable, itemid, text, valuenum. Rows of variables with classes keep their order; other rows may not.
    """
    is_class = pl.col("variable").is_in(CLASS_VARIABLES)
    class_values = _class_values()
    if not rules.none_is_class:
        class_values = class_values.filter(pl.col("text") != "None")
    classes = frame.filter(is_class).join(class_values, on=["variable", "text"], how="left", maintain_order="left")
    numbers = frame.filter(~is_class).with_columns(value=parse.number("text"))
    # Few rows are not plain numbers; apply the slow patterns to those alone.
    other = numbers.filter(pl.col("value").is_null()).with_columns(value=_parse_other_text(rules))
    numbers = pl.concat([numbers.filter(pl.col("value").is_not_null()), other]).with_columns(value=_convert(rules))
    frame = pl.concat([classes, numbers])
    fate = pl.when(pl.col("value").is_null()).then(pl.lit(NO_VALUE))
    if not rules.zero_size:
        fate = fate.when(_of("Height", "Weight") & (pl.col("value") == 0)).then(pl.lit(IMPOSSIBLE))
    frame = frame.with_columns(fate=fate)
    return _clip(frame) if rules.ranges else frame.with_columns(clipped=pl.lit(False))


def _class_values() -> pl.DataFrame:
    """Return a table that maps (variable, text) to `value`, the class's index."""
    rows = []
    for variable in CLASS_VARIABLES:
        values = {name: i for i, name in enumerate(schema.VARIABLES[variable].classes)}
        if variable == VARIABLE["Capillary refill rate"]:
            values |= {text: values[name] for text, name in CAPILLARY_TEXT.items()}
        rows += [(variable, text, float(i)) for text, i in values.items()]
    return pl.DataFrame(rows, {"variable": pl.UInt8, "text": pl.String, "value": pl.Float64}, orient="row")


def _of(*names: str) -> pl.Expr:
    return pl.col("variable").is_in([VARIABLE[name] for name in names])


def _parse_other_text(rules: Rules) -> pl.Expr:
    """Parse text that is not a number, as one of a pair of pressures; otherwise use `valuenum`, if the rules do."""

    def part(group: int) -> pl.Expr:
        return pl.col("text").str.extract(r"^(\d+)/(\d+)$", group).cast(pl.Float64)

    pressure = pl.when(_of("Systolic blood pressure")).then(part(1)).when(_of("Diastolic blood pressure")).then(part(2))
    return pl.coalesce(pressure, parse.number("valuenum")) if rules.lab_valuenum else pressure


def _convert(rules: Rules) -> pl.Expr:
    """Convert a number to its variable's unit."""
    value = pl.col("value")
    percent = _of("Fraction inspired oxygen")
    if rules.fio2_percent == "over_1":
        percent &= value > 1
    fahrenheit = pl.col("itemid") == TEMPERATURE_F
    if rules.fahrenheit == "over_79":
        # The released extraction looks for 'F' in lower-cased text, so only large values match.
        fahrenheit = _of("Temperature") & (value >= 79)
    inches = (pl.col("itemid") == HEIGHT_INCH) & pl.lit(rules.height_inches)
    return (
        pl.when(_of("Glucose", "pH", "Oxygen saturation") & (value < 0))
        .then(None)
        .when(percent)
        .then(value / 100)
        .when(inches)
        .then(value * CM_PER_INCH)
        .when(_of("Oxygen saturation") & (value <= 1))
        .then(value * 100)
        .when(fahrenheit)
        .then((value - 32) * 5 / 9)
        .when(pl.col("itemid") == WEIGHT_LB)
        .then(value * KG_PER_LB)
        .otherwise(value)
    )


def _clip(frame: pl.DataFrame) -> pl.DataFrame:
    """Clip values to RANGES (column `clipped`), and drop impossible ones."""
    limits = ("drop_low", "low", "high", "drop_high")
    bounds = pl.DataFrame(
        [(VARIABLE[name], *map(float, values)) for name, values in RANGES.items()],
        {"variable": pl.UInt8} | dict.fromkeys(limits, pl.Float64),
        orient="row",
    )
    frame = frame.join(bounds, on="variable", how="left", maintain_order="left")
    value = pl.col("value")
    impossible = ((value < pl.col("drop_low")) | (value > pl.col("drop_high"))).fill_null(False)
    outside = ((value < pl.col("low")) | (value > pl.col("high"))).fill_null(False)
    return frame.with_columns(
        fate=pl.when(impossible).then(pl.lit(IMPOSSIBLE)).otherwise("fate"),
        clipped=outside & ~impossible,
        value=pl.when(outside).then(value.clip("low", "high")).otherwise(value),
    ).drop(limits)
