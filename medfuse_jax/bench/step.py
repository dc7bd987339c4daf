"""The training step on batches that are already on the device, compared with its PyTorch peers.

Shapes: P X-rays, C pixels a side; batches as in `data.batches`, S steps of a plan.
"""

import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import augment, losses, optim, parallel
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.bench import clock, cohort, flops, machine, roofline
from medfuse_jax.bench.cases import Case
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.models import registry, resnet
from medfuse_jax.models.recurrence import supported
from medfuse_jax.runtime import compilation


def measure(case: Case, data: Dataset | None = None, say=lambda text, end="": None) -> list[dict]:
    """Return one record per contender. data: opened shards, or None to make up a dataset."""
    say("reading")
    sample = cohort.sample(case, data)
    trainer = Trainer(case, sample, say)
    peers, facts = torch_runs(case, sample, say)
    rows = records(
        case, sample, trainer, clock.interleave({clock.OURS: trainer.run} | peers, case.warm_up, case.repeats, say)
    )
    return [row | facts.get(row["contender"], {}) | _augmentation(sample) for row in rows]


def records(case: Case, sample: cohort.Sample, trainer: "Trainer", seconds: dict[str, list[float]]) -> list[dict]:
    """Return the contenders' records, with counts and rates; ours also with the step's FLOPs and memory."""
    counts, rows = sample.counts(), clock.records(seconds)
    for name, row in rows.items():
        per_s = 1 / float(np.median(seconds[name]))
        row |= counts | {
            "samples_per_s": round(counts["samples_per_repeat"] * per_s, 2),
            "samples_per_s_device": round(counts["samples_per_repeat"] * per_s / case.num_devices, 2),
            "images_per_s_device": round(counts["images_per_repeat"] * per_s / case.num_devices, 2),
        }
    rows[clock.OURS] |= trainer.work(rows[clock.OURS]["seconds"]) | sample.padding()
    return list(rows.values())


class Trainer:
    """Our training step, compiled for a case's batches. Each repeat continues from the state of the last."""

    def __init__(self, case: Case, sample: cohort.Sample, say=lambda text, end="": None):
        self._case, self.on = case, parallel.devices(case.num_devices)
        self.options = options = step_options(case, sample.data)
        self._step = parallel.compile_train(options, case.parallel, self.on)
        self.key = jax.random.key(0)
        say("ours: initialising")
        self.state = parallel.replicate(fresh_state(options), self.on)
        self.placed = list(parallel.prefetch(sample.batches, self.on))
        valid_time_steps = sum(int(batch["length"].sum()) for batch in sample.batches) if sample.data.use_ehr else 0
        self._lstm_flops = flops.lstm_flops(valid_time_steps, options.model.ehr_hidden)
        self._lengths, self._compiled = sample.plan.padded_length_S.tolist(), {}
        with compilation.counted() as self._compilations:
            for num_steps, batch in zip(self._lengths, self.placed):
                if num_steps not in self._compiled:
                    say(f"ours: compiling for {num_steps} time steps")
                    self._compiled[num_steps] = self._step.lower(self.state, batch, self.key).compile()

    def run(self) -> None:
        """Train on every batch once."""
        self.train(self.placed)

    def train(self, batches) -> None:
        """Train on batches that are already on the devices."""
        for batch in batches:
            self.state, metrics = self._step(self.state, batch, self.key)
        jax.block_until_ready((self.state, metrics))

    def compiled_for(self, number: int) -> jax.stages.Compiled:
        """Return the program that a batch runs."""
        return self._compiled[self._lengths[number]]

    def work(self, seconds: float) -> dict:
        """Return FLOPs, bytes, shares of the device's rates and memory of one pass that took `seconds`.

        FLOPs per device: XLA's count of the step with the longest padding, plus the LSTM's products over the valid time
        steps, since XLA counts a loop's body once, no matter how often it runs. Bytes: the compiler's, a loop's body
        once.
        """
        longest = int(np.argmax(self._lengths))
        shapes = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self.placed[longest].items()}
        total = flops.step_flops(self.options, self.state, shapes, self.compiled_for(longest))
        if total:
            total = len(self.placed) * total + self._lstm_flops / self._case.num_devices
        moved = [flops.compiled_cost(self._compiled[n]).get("bytes accessed") for n in self._lengths]
        memory = [compiled.memory_analysis() for compiled in self._compiled.values()]
        planned = [
            m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            for m in memory
            if m  # a backend may not say
        ]
        return roofline.shares(total, sum(moved) if all(moved) else None, seconds, self._case.precision) | {
            "recurrence": getattr(self.options.model, "recurrence", None),
            "compilations": self._compilations.number,
            "compile_s": round(self._compilations.seconds, 2),
            "step_memory_gb": round(max(planned) / 1e9, 3) if planned else None,
            "peak_device_bytes": machine.peak_device_bytes(),
        }


def step_options(case: Case, data: Dataset) -> step_lib.StepOptions:
    """Return the options of a case's training step."""
    return step_lib.StepOptions(
        model=registry.build(
            case.method,
            len(data.labels),
            dtype=jnp.dtype(case.precision),
            ops=resnet.ops_for(jax.default_backend()),
            recurrence=recurrence(case),
            **dict(case.sizes),
        ),
        optimizer=optim.adam(0.999),
        image=image_options(case),
        weights=losses.Weights(**config_lib.section("loss")),
        mean_F=tuple(data.mean_F.tolist()),
        std_F=tuple(data.std_F.tolist()),
    )


def recurrence(case: Case) -> str:
    """Return the LSTM kernel that a run with the default config uses on this machine."""
    width: int = dict(case.sizes).get("ehr_hidden", 256)
    fields = types.SimpleNamespace(
        recurrence="auto", parallel=case.parallel, model=types.SimpleNamespace(ehr_hidden=width, ehr_encoder="lstm")
    )
    return supported.choose(fields, parallel.devices(case.num_devices))


def fresh_state(options: step_lib.StepOptions) -> step_lib.TrainState:
    """Return an initial state, as a run makes it."""
    return step_lib.state_maker(options, run_once=True)(jax.random.key(0, impl="rbg"), 1e-4)


def torch_runs(case: Case, sample: cohort.Sample, say) -> tuple[dict[str, Callable[[], None]], dict[str, dict]]:
    """Return the case's PyTorch peers on the same batches, and how each runs; none on several devices."""
    if case.num_devices > 1 or not case.peers:
        return {}, {}
    if reason := machine.why_no_torch():
        say(f"without PyTorch: {reason}", end="\n")
        return {}, {}
    from medfuse_jax.bench import torch_peer

    image = image_options(case)
    runs, facts = {}, {}
    for name in case.peers:
        say(f"{name}: building")
        variant = torch_peer.VARIANTS[name]
        placed = [
            torch_peer.batch_for(variant, batch, None, sample.data.mean_F, sample.data.std_F)
            for batch in sample.batches
        ]
        num_labels, sizes = len(sample.data.labels), dict(case.sizes)
        runs[name], facts[name] = torch_peer.runner(
            variant, case.method, num_labels, placed, case.precision, sizes, image, say
        )
    return runs, facts


def image_options(case: Case) -> augment.ImageOptions:
    return augment.ImageOptions(**config_lib.section("image", resize_px=case.resize_px, crop_px=case.crop_px))


def _augmentation(sample: cohort.Sample) -> dict:
    """Say which contenders augment X-rays within the step."""
    return {"augmentation": "in all" if any("image" in batch for batch in sample.batches) else "no X-rays"}
