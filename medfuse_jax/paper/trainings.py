"""The trainings behind the tables of Hayat et al. 2022: what each trains on, starts from and searches.

The ids, such as E1 and M9, are those of docs/paper.md. Sources: sections 4.2 to 4.4 and Appendix A of the paper; for
the rates of E0 and E3, which it does not give, the released training scripts.
"""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax.paper import published
from medfuse_jax.runtime.errors import UserError, check_choice

TASKS = ("pheno", "mortality")
METHODS = ("lstm", "early", "joint", "mmtm", "daft", "unified", "medfuse", "missing")
RATES = ("search", "published")
SHARES = tuple(round(0.1 * n, 1) for n in range(10))  # of the EHR-only stays; 1.0 is M9

_PAIRED = {"data.train_stays": "paired", "data.val_stays": "paired"}
_RANDOM = {"encoders": "random"}
_EARLY = {"ehr": "E2", "cxr": "E3"}
_RELEASED_RATE = {"pheno": 1e-4, "mortality": 2.951e-5}  # of E3
_A2_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of the plan, or a group that differs in one field.

    fields: where its config differs from the default, beside task and learning rate. starts: encoder -> id of the
    training whose encoder it starts from. rate: the learning rate; None to search it. rate_of: the training whose best
    rate it takes. values: the values of `field` to train one after another.
    """

    id: str
    task: str
    title: str
    fields: dict
    group: str = ""
    starts: dict = dataclasses.field(default_factory=dict)
    rate: float | None = None
    rate_of: str = ""
    field: str = ""
    values: tuple = ()

    @property
    def needs(self) -> list[str]:
        return [*self.starts.values(), *filter(None, [self.rate_of])]

    @property
    def is_paired(self) -> bool:
        return self.fields.get("data.train_stays") == "paired"

    @property
    def is_sweep(self) -> bool:
        return bool(self.values) or self.rate is None

    @property
    def is_chosen_twice(self) -> bool:
        """Whether its rate is searched on all stays, so that all validation stays and the paired ones may differ."""
        return self.rate is None and not (self.values or self.is_paired)

    def num_runs(self, trials: int) -> int:
        if self.values:
            return len(self.values)
        return trials if self.rate is None else 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all trainings of a plan.

    rates: 'search' or 'published'. trials: learning rates a search. search_e3: whether to search the rate of E3 too.
    imagenet: workdir of imported ImageNet weights for E0; '' for a random start. fields: of every config.
    """

    rates: str = "search"
    trials: int = 10
    seed: int = 0
    search_e3: bool = False
    imagenet: str = ""
    fields: dict = dataclasses.field(default_factory=dict)


def in_order(tasks: Sequence[str]) -> list[str]:
    """Return the tasks once each, in the order of the tables' columns. Raises UserError for an unknown one."""
    for task in tasks:
        check_choice("--tasks", task, TASKS)
    return [task for task in TASKS if task in tasks]


def plan(tasks: Sequence[str], methods: Sequence[str], settings: Settings) -> list[Training]:
    """Return the trainings of the chosen tasks and methods, and those that they start from, in an order to run them.

    Raises UserError for an unknown task or method, or without a task.
    """
    tasks = in_order(tasks)
    for method in methods:
        check_choice("--methods", method, METHODS)
    check_choice("--rates", settings.rates, RATES)
    if not tasks:
        raise UserError(f"--tasks is empty: give some of {', '.join(TASKS)}", field="--tasks")
    chosen = []
    for task in tasks:
        of_task = _of_task(task, settings)
        # The LSTM is what every other method is compared with.
        wanted = {t.id for t in of_task if t.group in (*methods, "lstm")}
        for training in reversed(of_task):
            wanted |= set(training.needs) if training.id in wanted else set()
        chosen.append([t for t in of_task if t.id in wanted])
    needs_e0 = any("E0" in t.needs for of_task in chosen for t in of_task)
    return ([_e0(settings)] if needs_e0 else []) + [t for of_task in chosen for t in of_task]


def _e0(settings: Settings) -> Training:
    fields = {"method": "uni_cxr"} | ({"init.cxr": settings.imagenet} if settings.imagenet else {})
    return Training("E0", "radiology", "ResNet on the radiology labels", fields, rate=1e-4)


def _of_task(task: str, settings: Settings) -> list[Training]:
    searched = settings.rates == "search"

    def row(id: str, group: str, title: str, method: str, fields: dict, starts=None, **more) -> Training:
        given = more.pop("rate", None if searched else published.rate(task, id.partition("_")[0]))
        return Training(id, task, title, {"method": method} | fields, group, starts or {}, given, **more)

    def depths(id: str, name: str, title: str, group: str) -> list[Training]:
        layers = (3, 4) if searched else (published.depth(task, id),)
        kept = _PAIRED | _RANDOM
        return [row(f"{id}_{n}", group, f"{title}, layer {n}", f"{name}{n}", kept) for n in layers]

    def a2(name: str, title: str, method: str, fields: dict, starts=None) -> Training:
        return row(f"A2_{name}", "missing", title, method, fields, starts, rate=_A2_RATE)

    learnt = {"model.missing_cxr": "learnt"}
    e3_rate = None if searched and settings.search_e3 else _RELEASED_RATE[task]
    medfuse = {"ehr": "E1", "cxr": "E0"}
    early_a2 = {"ehr": "A2_lstm", "cxr": "E3"}
    return [
        row("E1", "lstm", "LSTM (partial)", "uni_ehr", {}),
        row("E2", "lstm", "LSTM (paired)", "uni_ehr", _PAIRED),
        row("E3", "", "ResNet on the task's labels (paired)", "uni_cxr", _PAIRED, rate=e3_rate),
        row("M1", "early", "Early (paired)", "early", _PAIRED, _EARLY),
        row("M2", "early", "Early (partial)", "early", learnt, _EARLY),
        row("M3", "joint", "Joint (paired)", "joint", _PAIRED | _RANDOM),
        row("M4", "joint", "Joint (partial)", "joint_learnable", _RANDOM),
        *depths("M5", "mmtm", "MMTM", "mmtm"),
        *depths("M6", "daft", "DAFT", "daft"),
        row("M7", "unified", "Unified", "unified", _RANDOM),
        row("M8", "medfuse", "MedFuse (RI)", "medfuse", _RANDOM),
        row("M9", "medfuse", "MedFuse (PT)", "medfuse", {}, medfuse),
        row(
            "OPT",
            "medfuse",
            "MedFuse with few EHR-only stays",
            "medfuse",
            {},
            medfuse,
            rate_of="M9",
            field="data.ehr_only_ratio",
            values=SHARES,
        ),
        a2("lstm", "LSTM for early, rate 1e-4", "uni_ehr", {}),
        a2("joint_zeros", "Joint, zeros", "joint_zeros", _RANDOM),
        a2("joint_learnt", "Joint, learnt vector", "joint_learnable", _RANDOM),
        a2("early_zeros", "Early, zeros", "early", {}, early_a2),
        a2("early_learnt", "Early, learnt vector", "early", learnt, early_a2),
    ]


def config_of(training: Training, settings: Settings, starts: dict[str, str], rate: float | None) -> ConfigDict:
    """Return the config of a training. starts: encoder -> workdir of the run it starts from; rate: see Training."""
    config = config_lib.default()
    fields = settings.fields | training.fields | {f"init.{name}": path for name, path in starts.items()}
    fields |= {"name": f"paper_{training.id}", "task": training.task, "seed": settings.seed}
    if rate is not None:
        fields["learning_rate"] = rate
    config.update_from_flattened_dict(fields)
    return config
