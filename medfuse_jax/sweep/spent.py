"""Where the time of one start of a sweep went: what is paid once for all trials, and what all of them trained."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Costs:
    """Where the time of this start went, in seconds, and on how many trials.

    startup_s, pretrain_s (or waiting for the process that does) and encode_s are without compile_s.
    """

    trials: int = 0
    startup_s: float = 0.0
    pretrain_s: float = 0.0
    encode_s: float = 0.0
    compile_s: float = 0.0
    input_s: float = 0.0
    train_s: float = 0.0
    steps: int = 0

    @contextlib.contextmanager
    def spent(self, field: str) -> Iterator[None]:
        """Counts the block's time, but for what it compiles."""
        start_s, compiled_s = time.perf_counter(), self.compile_s
        yield
        taken_s = time.perf_counter() - start_s - (self.compile_s - compiled_s)
        setattr(self, field, getattr(self, field) + taken_s)

    def count_compilation(self) -> None:
        """Keeps compile_s up to date from here on."""

        def listen(event: str, duration_s: float, **_) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                self.compile_s += duration_s

        jax.monitoring.register_event_duration_secs_listener(listen)

    def started(self, started_s: float) -> None:
        """Counts what went before the first trial, since `started_s`, as start-up."""
        self.startup_s = time.perf_counter() - started_s - self.pretrain_s - self.compile_s

    def summary(self) -> str:
        return (
            f"once for {self.trials} trials: pre-training {self.pretrain_s:.1f} s, start-up {self.startup_s:.1f} s, "
            f"encoding {self.encode_s:.1f} s, compilation {self.compile_s:.1f} s, "
            f"waiting for input {self.input_s:.1f} s; {self.steps} steps of all in {self.train_s:.1f} s"
        )
