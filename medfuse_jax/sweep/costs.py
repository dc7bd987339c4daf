"""Where the time of one start of a sweep went: what is paid once for all trials, and what all of them trained."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from medfuse_jax.runtime import compilation


@dataclasses.dataclass
class Costs:
    """Where the time of this start went, in seconds, and on how many trials.

    startup_s, pretrain_s (or waiting for the process that does) and encode_s are without what `compiled` took.
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
    def spent(self, field: str) -> Iterator[None]:
        """Counts the block's time, but for what it compiles."""
        start_s, compiled_s = time.perf_counter(), self.compiled.seconds
        yield
        taken_s = time.perf_counter() - start_s - (self.compiled.seconds - compiled_s)
        setattr(self, field, getattr(self, field) + taken_s)

    def started(self, started_s: float) -> None:
        """Counts what went before the first trial, since `started_s`, as start-up."""
        self.startup_s = time.perf_counter() - started_s - self.pretrain_s - self.compiled.seconds

    def summary(self) -> str:
        return (
            f"once for {self.trials} trials: pre-training {self.pretrain_s:.1f} s, start-up {self.startup_s:.1f} s, "
            f"encoding {self.encode_s:.1f} s, compilation {self.compiled.seconds:.1f} s, "
            f"waiting for input {self.input_s:.1f} s; {self.steps} steps of all in {self.train_s:.1f} s"
        )
