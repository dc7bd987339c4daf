"""Where the time of one start of a sweep goes: costs paid once for all trials, and the training steps."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from medfuse_jax.runtime import compilation
from medfuse_jax.sweep import results


@dataclasses.dataclass
class Costs:
    """The seconds spent in this start, and the number of trials that it trained.

    startup_s, pretrain_s (which includes waiting for the process that pre-trains) and encode_s exclude compilation.
    """

    trials: int = 0
    startup_s: float = 0.0
    pretrain_s: float = 0.0
    encode_s: float = 0.0
    compiled: compilation.Count = dataclasses.field(default_factory=compilation.Count)
    input_s: float = 0.0
    train_s: float = 0.0
    steps: int = 0

    @contextlib.contextmanager
    def timed(self, field: str) -> Iterator[None]:
        """Add the block's time, without compilation, to a field."""
        start_s, compiled_s = time.perf_counter(), self.compiled.seconds
        yield
        taken_s = time.perf_counter() - start_s - (self.compiled.seconds - compiled_s)
        setattr(self, field, getattr(self, field) + taken_s)

    def end_startup(self, start_s: float) -> None:
        """Count all time since `start_s`, without pre-training and compilation, as start-up."""
        self.startup_s = time.perf_counter() - start_s - self.pretrain_s - self.compiled.seconds

    def write(self, workdir: Path) -> None:
        """Write costs.json."""
        content = dataclasses.asdict(self)
        content["compile_s"] = content.pop("compiled")["seconds"]
        results.write_json(workdir / "costs.json", {name: round(value, 3) for name, value in content.items()})

    def summary(self) -> str:
        return (
            f"once for {self.trials} trials: pre-training {self.pretrain_s:.1f} s, start-up {self.startup_s:.1f} s, "
            f"encoding {self.encode_s:.1f} s, compilation {self.compiled.seconds:.1f} s, "
            f"waiting for input {self.input_s:.1f} s; {self.steps} steps of all trials in {self.train_s:.1f} s"
        )
