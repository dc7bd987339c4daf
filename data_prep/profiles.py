"""The profiles: every place where `paper`, `released` and `strict` prepare data differently.

Each difference is one field of `Rules`, with its reason beside it, and nowhere else: the
other modules ask the rule, never the profile's name. `explain` prints them.
"""

import dataclasses

from medfuse_jax.runtime.errors import check_choice


def _rule(why: str):
    return dataclasses.field(metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class Rules:
    """What one profile does; the reason for each rule is in its field's metadata['why']."""

    same_time: str = _rule(
        "Rows of one variable at one time. mean: the mean of numbers, the last class; of rows of one item and value "
        "one counts, because nothing tells a row given twice from two measurements that agree: 80, 80 and 90 are 85 "
        "(the mean of all rows would be 83.3), and the audit counts what is left out so. "
        "largest: the largest by sort order, where heart rate, mean blood pressure and respiratory rate "
        "sort as text, so that 99 beats 100 (released extraction)."
    )
    fio2_percent: str = _rule(
        "Inspired oxygen to a fraction. over_1: values over 1 are percent. all: every value is divided by 100, "
        "so that 0.5 becomes 0.005 (released extraction)."
    )
    height_inches: bool = _rule(
        "Item 226707 is in inches and becomes cm. Off: left in inches, mixed with cm (released extraction)."
    )
    fahrenheit: str = _rule(
        "Temperature to Celsius. item: item 223761 is Fahrenheit. over_79: any value of 79 or more "
        "(released extraction)."
    )
    capillary_refill: bool = _rule(
        "Items 223951 and 224308 are read. Off: the channel never moves (released extraction)."
    )
    lab_valuenum: bool = _rule(
        "A laboratory row whose text is no number ('___') takes its `valuenum`. Off: dropped, and with it nearly "
        "all serum glucose (released extraction)."
    )
    ranges: bool = _rule(
        "Values outside a variable's plausible range are clipped, impossible ones dropped. Off (released extraction)."
    )
    zero_size: bool = _rule(
        "A height or weight of 0 is a value. Off: dropped, as nobody measures 0 cm or 0 kg; the benchmark's plausible "
        "ranges begin at 0. On in the released extraction."
    )
    phenotypes: str = _rule(
        "Without --phenotypes, codes become labels by ICD-9 -> CCS, and ICD-10 -> ICD-9 by the GEMs, `icd_version` "
        "respected. table: expects the released table by --phenotypes, which knows no version."
    )
    image_shape: str = _rule(
        "How an X-ray becomes 256 x 256. squash: both sides resized to 256 (paper, appendix A.1). crop: the shorter "
        "side to 256, then the centre (released transforms)."
    )
    pheno_window_h: float | None = _rule(
        "Hours of a stay that phenotyping may see, X-rays included. None: the whole stay, although its labels are "
        "to be predicted (paper and released)."
    )
    stored_in_time: bool = _rule(
        "An event whose `storetime` is after the end of what its task may see is left out, because nobody could have "
        "read it by then; one without a storetime counts by its charttime. Off: charttime alone counts (paper and "
        "released). Its limit: of tasks with a label an hour that end is the stay's, so that at one of their hours an "
        "event may be seen that was stored later in the stay."
    )


PAPER = Rules(
    same_time="mean",
    fio2_percent="over_1",
    height_inches=True,
    fahrenheit="item",
    capillary_refill=True,
    lab_valuenum=True,
    ranges=True,
    zero_size=False,
    phenotypes="gem",
    image_shape="squash",
    pheno_window_h=None,
    stored_in_time=False,
)
RELEASED = Rules(
    same_time="largest",
    fio2_percent="all",
    height_inches=False,
    fahrenheit="over_79",
    capillary_refill=False,
    lab_valuenum=False,
    ranges=False,
    zero_size=True,
    phenotypes="table",
    image_shape="crop",
    pheno_window_h=None,
    stored_in_time=False,
)
PROFILES = {
    "paper": PAPER,
    "released": RELEASED,
    # An X-ray counts from `intime` on in every profile, so that rule needs no field.
    "strict": dataclasses.replace(PAPER, pheno_window_h=48.0, stored_in_time=True),
}


def rules(profile: str) -> Rules:
    """The rules of a profile; UserError for a name that is none."""
    check_choice("--profile", profile, PROFILES)
    return PROFILES[profile]


def describe(profile: str) -> dict[str, dict]:
    """Rule name -> {'value', 'why'}, for the manifest."""
    chosen = rules(profile)
    return {
        field.name: {"value": getattr(chosen, field.name), "why": field.metadata["why"]}
        for field in dataclasses.fields(chosen)
    }


def explain(profile: str) -> str:
    """The rules of a profile as text, one rule a paragraph, a mark where it differs from `paper`."""
    lines = [f"profile {profile} (* differs from paper)"]
    for name, rule in describe(profile).items():
        mark = "*" if rule["value"] != getattr(PAPER, name) else " "
        lines.append(f"{mark} {name} = {rule['value']}\n      {rule['why']}")
    return "\n".join(lines)
