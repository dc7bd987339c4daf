"""What is measured and what is predicted: variables, channels, labels, tasks.

`data_prep`, which writes the shards, and `medfuse_jax`, which reads them, share these definitions. Sources:

- The 17 variables, their classes and the values assumed before a first observation: the benchmark of Harutyunyan et al.
  2019 (arXiv 1703.07771), in the edition that the released MedFuse reads.
- The 25 phenotypes and their types: Table 4 of Hayat et al. 2022.
- The 14 radiology labels: CheXpert (Irvin et al. 2019).
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Variable:
    """One clinical variable.

    classes: the text classes in one-hot order, or () for a continuous variable.
    default: the value assumed before the first observation, one of the classes if there are any.
    unit: of a continuous variable's values.
    """

    name: str
    default: float | str
    classes: tuple[str, ...] = ()
    unit: str = ""


# Classes spelled in two ways keep two slots, and "Glascow" keeps its spelling, because released checkpoints were
# trained on exactly these channels.
VARIABLES = (
    Variable("Capillary refill rate", "0.0", ("0.0", "1.0")),
    Variable("Diastolic blood pressure", 59.0, unit="mmHg"),
    Variable("Fraction inspired oxygen", 0.21, unit="fraction"),
    Variable(
        "Glascow coma scale eye opening",
        "4 Spontaneously",
        (
            "To Pain",
            "3 To speech",
            "1 No Response",
            "4 Spontaneously",
            "None",
            "To Speech",
            "Spontaneously",
            "2 To pain",
        ),
    ),
    Variable(
        "Glascow coma scale motor response",
        "6 Obeys Commands",
        (
            "1 No Response",
            "3 Abnorm flexion",
            "Abnormal extension",
            "No response",
            "4 Flex-withdraws",
            "Localizes Pain",
            "Flex-withdraws",
            "Obeys Commands",
            "Abnormal Flexion",
            "6 Obeys Commands",
            "5 Localizes Pain",
            "2 Abnorm extensn",
        ),
    ),
    Variable(
        "Glascow coma scale total",
        "15",
        ("11", "10", "13", "12", "15", "14", "3", "5", "4", "7", "6", "9", "8"),
    ),
    Variable(
        "Glascow coma scale verbal response",
        "5 Oriented",
        (
            "1 No Response",
            "No Response",
            "Confused",
            "Inappropriate Words",
            "Oriented",
            "No Response-ETT",
            "5 Oriented",
            "Incomprehensible sounds",
            "1.0 ET/Trach",
            "4 Confused",
            "2 Incomp sounds",
            "3 Inapprop words",
        ),
    ),
    Variable("Glucose", 128.0, unit="mg/dL"),
    Variable("Heart Rate", 86.0, unit="1/min"),
    Variable("Height", 170.0, unit="cm"),
    Variable("Mean blood pressure", 77.0, unit="mmHg"),
    Variable("Oxygen saturation", 98.0, unit="%"),
    Variable("Respiratory rate", 19.0, unit="1/min"),
    Variable("Systolic blood pressure", 118.0, unit="mmHg"),
    Variable("Temperature", 36.6, unit="C"),
    Variable("Weight", 81.0, unit="kg"),
    Variable("pH", 7.4),
)


def _value_channels() -> tuple[str, ...]:
    names = []
    for variable in VARIABLES:
        if variable.classes:
            names += [f"{variable.name}->{c}" for c in variable.classes]
        else:
            names.append(variable.name)
    return tuple(names)


VALUE_CHANNELS = _value_channels()  # 59: 12 continuous and 47 one-hot
CHANNELS = VALUE_CHANNELS + tuple(f"mask->{v.name}" for v in VARIABLES)  # 76
CONTINUOUS_CHANNELS = tuple(CHANNELS.index(v.name) for v in VARIABLES if not v.classes)


@dataclasses.dataclass(frozen=True)
class Phenotype:
    """One phenotype label: a CCS single-level category (AHRQ HCUP) and its type."""

    ccs: int
    kind: str  # 'acute' | 'mixed' | 'chronic'
    name: str


PHENOTYPES = (
    Phenotype(157, "acute", "Acute and unspecified renal failure"),
    Phenotype(109, "acute", "Acute cerebrovascular disease"),
    Phenotype(100, "acute", "Acute myocardial infarction"),
    Phenotype(106, "mixed", "Cardiac dysrhythmias"),
    Phenotype(158, "chronic", "Chronic kidney disease"),
    Phenotype(127, "chronic", "Chronic obstructive pulmonary disease and bronchiectasis"),
    Phenotype(238, "acute", "Complications of surgical procedures or medical care"),
    Phenotype(105, "mixed", "Conduction disorders"),
    Phenotype(108, "mixed", "Congestive heart failure; nonhypertensive"),
    Phenotype(101, "chronic", "Coronary atherosclerosis and other heart disease"),
    Phenotype(50, "mixed", "Diabetes mellitus with complications"),
    Phenotype(49, "chronic", "Diabetes mellitus without complication"),
    Phenotype(53, "chronic", "Disorders of lipid metabolism"),
    Phenotype(98, "chronic", "Essential hypertension"),
    Phenotype(55, "acute", "Fluid and electrolyte disorders"),
    Phenotype(153, "acute", "Gastrointestinal hemorrhage"),
    Phenotype(99, "chronic", "Hypertension with complications and secondary hypertension"),
    Phenotype(151, "mixed", "Other liver diseases"),
    Phenotype(133, "acute", "Other lower respiratory disease"),
    Phenotype(134, "acute", "Other upper respiratory disease"),
    Phenotype(130, "acute", "Pleurisy; pneumothorax; pulmonary collapse"),
    Phenotype(122, "acute", "Pneumonia (except that caused by tuberculosis or sexually transmitted disease)"),
    Phenotype(131, "acute", "Respiratory failure; insufficiency; arrest (adult)"),
    Phenotype(2, "acute", "Septicemia (except in labor)"),
    Phenotype(249, "acute", "Shock"),
)

RADIOLOGY_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One prediction task, and one dataset on disk.

    title: its name in reports.
    labels: names of the K binary labels, in order.
    window_h: hours of the stay that a model may see, or None for the whole stay.
    cxr_only: records are X-rays (no ICU stay, ehr of length 0).
    hourly: a stay has labels at many prediction times, label [H, K] (records.py).
    exclusive: exactly one label is true, so that the scores are a softmax's.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    window_h: float | None = None
    cxr_only: bool = False
    hourly: bool = False
    exclusive: bool = False

    @property
    def unit(self) -> str:
        """What the task's records are called: 'stays' or 'X-rays'."""
        return "X-rays" if self.cxr_only else "stays"


# Remaining length of stay, days: [0, 1) ... [7, 8), [8, 14), [14, inf). Harutyunyan et al. 2019.
LENGTH_OF_STAY_EDGES_DAYS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 14)
_LENGTH_OF_STAY_LABELS = ("under 1 day", *(f"{d} to {d + 1} days" for d in range(1, 8)), "8 to 14 days", "over 14 days")

TASKS = {
    "pheno": Task("pheno", "Phenotyping", tuple(p.name for p in PHENOTYPES)),
    "mortality": Task("mortality", "In-hospital mortality", ("In-hospital mortality",), window_h=48.0),
    "radiology": Task("radiology", "Radiology findings", RADIOLOGY_LABELS, cxr_only=True),
    "decompensation": Task("decompensation", "Decompensation", ("Death within 24 h",), hourly=True),
    "length_of_stay": Task("length_of_stay", "Length of stay", _LENGTH_OF_STAY_LABELS, hourly=True, exclusive=True),
}


def selected_by(task: str) -> str:
    """Return the validation score that selects a task's models: 'AUROC' or 'kappa'."""
    return "kappa" if task in TASKS and TASKS[task].exclusive else "AUROC"


def label_types(task: str, labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the places of each type's labels, 'acute', 'mixed' and 'chronic', in a phenotyping task; else {}."""
    kinds = {p.name: p.kind for p in PHENOTYPES} if task == "pheno" else {}
    places: dict[str, list[int]] = {kind: [] for kind in ("acute", "mixed", "chronic")}
    for k, label in enumerate(labels):
        if label in kinds:  # others are of a phenotype table of one's own
            places[kinds[label]].append(k)
    return {kind: of_kind for kind, of_kind in places.items() if of_kind}


SPLITS = ("train", "val", "test")
IN_WINDOW, UNTIL_OUTTIME = "in_window", "until_outtime"  # of a manifest's pairing; data_prep.profiles explains them
STATIC_TEXTS = ("gender", "admission_type", "first_careunit")  # known when a stay begins; '' if unknown
RACE = "race"  # in the index alone, so that no model can read it from a record; absent in older shards
# Groups of the tables' race or ethnicity, for evaluation alone: never an input. 'Unknown' is also what was not told.
RACES = ("White", "Black", "Hispanic or Latino", "Asian", "Other", "Unknown")
FEWEST_SHOWN = 10  # stays or X-rays, below which results withhold a group's numbers: they could point to patients
IMAGE_SIZE_PX = 256  # X-rays are stored square, one grey uint8 channel

# Age groups of Hayat et al. 2022, Table 5: years, low <= age < high.
AGE_GROUPS = ((18, 40), (40, 60), (60, 80), (80, math.inf))
