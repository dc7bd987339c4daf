"""The plan of a folder: the trainings behind its tables, and where they are."""

import dataclasses
from pathlib import Path

from medfuse_jax import records
from medfuse_jax.data import folds
from medfuse_jax.data.shards import Shards
from medfuse_jax.paper.trainings import Settings, Training


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a folder's tables are made of. Another plan is refused there."""

    out: Path
    data_dir: str
    tasks: tuple[str, ...]
    settings: Settings
    trainings: list[Training]

    def folder_of(self, training: Training) -> Path:
        return self.out / "runs" / training.task / training.id

    def is_done(self, training: Training) -> bool:
        return (self.folder_of(training) / "done.json").exists()

    def repeated(self, repeat) -> "Plan":
        """Return the plan with the seed and fold of a sweep.repeats.Repeat, in a folder of its own."""
        fields = self.settings.fields | {"data.folds": repeat.folds, "data.fold": repeat.fold}
        settings = dataclasses.replace(self.settings, seed=repeat.seed, fields=fields)
        return dataclasses.replace(self, out=self.out / repeat.name, settings=settings)

    def indices(self, task: str) -> dict[str, dict]:
        """Return the index of each split of a task, of the plan's fold if it has one."""
        fields = self.settings.fields
        fold = folds.Fold(fields["data.fold"], fields["data.folds"]) if fields.get("data.folds") else None
        return Shards(self.data_dir, task, fold).index

    def manifests(self) -> dict[str, dict]:
        """Return the manifest of every task that the plan reads."""
        tasks = dict.fromkeys([*self.tasks, *(t.task for t in self.trainings)])
        if any(t.fields["method"] == "unified" for t in self.trainings):
            tasks["radiology"] = None
        return {task: records.manifest(self.data_dir, task) for task in tasks}

    def find(self, id: str, task: str) -> Training:
        return next(t for t in self.trainings if t.id == id and t.task in (task, "radiology"))
