"""The profiles `paper`, `released` and `strict`: every difference in how they prepare the data.

Each difference is one field of `Rules`, with its reason. Other modules ask for the rule, never for the profile's name.
`PAIRING` explains the values of --pairing, which may be combined with `paper` and `released`.
"""

import dataclasses

from medfuse_jax import schema
from medfuse_jax.runtime.errors import check_choice


def _rule(paper: object, why: str):
    return dataclasses.field(default=paper, metadata={"why": why})


@dataclasses.dataclass(frozen=True)
class Rules:
    """The rules of one profile, `paper` by default; each field's metadata['why'] explains it."""

    same_time: str = _rule(
        "mean",
        "Rows of one variable at one time. mean: the mean of numbers, the last class; rows of one item and value "
        "count once, because duplicates cannot be told from repeated measurements: 80, 80 and 90 are 85, not 83.3. "
        "largest: the last by sort order, where heart rate, mean blood pressure and respiratory rate sort as text, so "
        "that 99 beats 100 (released extraction).",
    )
    fio2_percent: str = _rule(
        "over_1",
        "Inspired oxygen to a fraction. over_1: values over 1 are percent. all: every value is divided by 100, so 0.5 "
        "becomes 0.005 (released extraction).",
    )
    height_inches: bool = _rule(
        True, "Item 226707 is converted from inches to cm. Off: kept in inches, mixed with cm (released extraction)."
    )
    fahrenheit: str = _rule(
        "item",
        "Fahrenheit to Celsius. item: values of item 223761. over_79: values of 79 or more (released extraction).",
    )
    none_is_class: bool = _rule(
        True,
        "'None' of the eye score (the eyes stay closed) is a class, not a missing value, in every profile, as in the "
        "released extraction: pandas before 2.0 reads it as text.",
    )
    capillary_refill: bool = _rule(
        True, "Items 223951 and 224308 are read. Off: the channel is constant (released extraction)."
    )
    lab_valuenum: bool = _rule(
        True,
        "A laboratory row whose text is not a number ('___') uses its `valuenum`. Off: dropped, and with it nearly "
        "all serum glucose (released extraction).",
    )
    ranges: bool = _rule(
        True, "Values outside the plausible range are clipped, impossible ones dropped. Off in the released extraction."
    )
    zero_size: bool = _rule(False, "A height or weight of 0 is kept (released extraction). Off: dropped as impossible.")
    phenotypes: str = _rule(
        "gem",
        "How codes become labels without --phenotypes. gem: ICD-9 -> CCS, and ICD-10 -> ICD-9 -> CCS by the GEMs, by "
        "`icd_version`. table: as gem, with a warning, because the released table is expected in --phenotypes; it "
        "ignores the version.",
    )
    after_death: bool = _rule(
        False,
        "Stays that begin after the patient's death (organ donors), and events and X-rays from after it, count "
        "(released extraction). Off: dropped. Death is the first `deathtime`, or else the end of the day `dod`.",
    )
    deaths_in_window: bool = _rule(
        True,
        "Stays whose patient dies before the end of the task's window are kept, although their outcome is known by "
        "then; the audit counts them (paper and released). Off: left out (strict).",
    )
    undiagnosed: bool = _rule(
        True,
        "Stays of an admission without a row in diagnoses_icd are kept, with no phenotype; the audit counts them. Off: "
        "dropped from every task (the released extraction joins stays with their diagnoses).",
    )
    image_shape: str = _rule(
        "squash",
        "How an X-ray becomes 256 x 256. squash: both sides resized to 256 (paper, appendix A.1). crop: the shorter "
        "side to 256, then the centre (released transforms).",
    )
    pheno_window_h: float | None = _rule(
        None,
        "Hours of a stay that phenotyping may use, X-rays included. None: the whole stay, although its labels are "
        "to be predicted (paper and released).",
    )
    stored_in_time: bool = _rule(
        False,
        "Events whose `storetime` is after the end of the task's window are dropped, because nobody could have read "
        "them in time; events without a storetime count by charttime. Off: only charttime counts (paper and released). "
        "Limit: the window of hourly tasks is the stay, so one of their predictions may use an event that was stored "
        "later in the stay.",
    )

    def window_h(self, task: schema.Task) -> float | None:
        """Return the hours from `intime` that a task's inputs may come from; None for the whole stay."""
        return self.pheno_window_h if task.name == "pheno" else task.window_h


PAPER = Rules()
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
    after_death=True,
    undiagnosed=False,
    image_shape="crop",
)
PROFILES = {
    "paper": PAPER,
    "released": RELEASED,
    # In every profile X-rays count from `intime` on, so no rule is needed for that.
    "strict": dataclasses.replace(PAPER, pheno_window_h=48.0, stored_in_time=True, deaths_in_window=False),
}


IN_WINDOW, UNTIL_OUTTIME = schema.IN_WINDOW, schema.UNTIL_OUTTIME
PAIRING = {
    IN_WINDOW: "A stay is paired with its last AP X-ray from the task's window (mortality: the first 48 h).",
    UNTIL_OUTTIME: "For comparison with the published mortality results alone: mortality stays are paired with X-rays "
    "up to the end of the stay, as in the authors' code before 2023-03-02. Such an X-ray may be later than the window, "
    "so manifest, audit, and every result, page and printed table of such data are marked.",
}


def rules(profile: str) -> Rules:
    """Return a profile's rules; raise UserError for an unknown name."""
    check_choice("--profile", profile, PROFILES)
    return PROFILES[profile]


def describe(profile: str) -> dict[str, dict]:
    """Return rule name -> {'value', 'why'}, for the manifest."""
    chosen = rules(profile)
    return {
        field.name: {"value": getattr(chosen, field.name), "why": field.metadata["why"]}
        for field in dataclasses.fields(chosen)
    }


def explain(profile: str, pairing: str = IN_WINDOW) -> str:
    """Return a profile's rules and the pairing as text; * marks what differs from the default."""
    check_choice("--pairing", pairing, PAIRING)
    lines = [f"profile {profile} (* differs from paper)"]
    for name, rule in describe(profile).items():
        mark = "*" if rule["value"] != getattr(PAPER, name) else " "
        lines.append(f"{mark} {name} = {rule['value']}\n      {rule['why']}")
    lines.append(f"{' ' if pairing == IN_WINDOW else '*'} pairing = {pairing}\n      {PAIRING[pairing]}")
    return "\n".join(lines)
