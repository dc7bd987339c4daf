"""Ten steps in jax's profiler: what the device ran and what the host launched, beside what the compiled program has."""

import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from medfuse_jax.bench import clock, cohort, hlo, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.models.recurrence import chunks

STEPS = 10
# Calls of CUDA that give the GPU something to do.
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset)", re.IGNORECASE)


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return one record: the time of a traced step, and its events. data: opened shards, or None to make them up."""
    sample = cohort.sample(case, data)
    trainer = step.Trainer(case, sample, say)
    longest = int(np.argmax([int(batch["length"].max()) if "length" in batch else 0 for batch in sample.batches]))
    batches = STEPS * [trainer.placed[longest]]
    trainer.train(batches)
    say(f"tracing {STEPS} steps")
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            trainer.train(batches)
            seconds = (time.perf_counter() - start) / STEPS
        (path,) = Path(folder).rglob("*.xplane.pb")
        counted = events(jax.profiler.ProfileData.from_file(str(path)))
    row = {"contender": clock.OURS} | clock.summary([seconds])
    row |= {name: None if number is None else round(number / STEPS, 1) for name, number in counted.items()}
    time_steps = int(sample.batches[longest]["length"].max()) if "length" in sample.batches[longest] else 0
    return [row | {"compiled_kernels_a_step": compiled_kernels(trainer.compiled_for(longest), time_steps)}]


def events(data) -> dict[str, float | None]:
    """Count what ran on the devices and what the host launched (on NVIDIA GPUs); None for both on a CPU."""
    durations_ns, launched, is_traced = [], 0, False
    for plane in data.planes:
        is_traced |= plane.name.startswith("/device:")
        for line in plane.lines:
            if plane.name.startswith("/device:") and line.name.startswith(("Stream", "XLA Ops")):
                durations_ns += [event.duration_ns for event in line.events]
            elif plane.name.startswith("/host:"):
                launched += sum(bool(_LAUNCH.match(event.name)) for event in line.events)
    ran, busy_us = len(durations_ns), sum(durations_ns) / 1e3
    counted = {"device_events_a_step": ran, "device_us_a_step": busy_us, "launches_a_step": launched or None}
    return counted if is_traced else dict.fromkeys(counted)


def compiled_kernels(compiled: jax.stages.Compiled, time_steps: int) -> int:
    """Count what the compiled step runs for a series of this length, that in CUDA graphs too."""
    trips = chunks.time_steps_run(time_steps) // chunks.CHUNK_STEPS or 1
    return sum(times for _, times in hlo.executed(hlo.parse(compiled.as_text()), trips, in_graphs=True))
