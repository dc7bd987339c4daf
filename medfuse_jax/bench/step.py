"""The training step on batches that are already on the device, compared with its PyTorch peers.

Shapes: P X-rays, C pixels a side; batches as in `data.batches`, S steps of a plan.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import augment, losses, optim, parallel
from medfuse_jax import config as config_lib
from medfuse_jax import step as step_lib
from medfuse_jax.bench import clock, cohort, flops, machine
from medfuse_jax.bench.cases import Case
from medfuse_jax.data.dataset import Dataset
from medfuse_jax.models import registry, resnet
from medfuse_jax.runtime import compilation


def measure(case: Case, data: Dataset | None = None, say=lambda text: None) -> list[dict]:
    """Return one record per contender. data: opened shards, or None to make up a dataset."""
    say("reading")
    sample = cohort.sample(case, data)
    trainer = Trainer(case, sample, say)
    runs = {clock.OURS: trainer.run} | _peers(case, sample, say)
    return records(case, sample, trainer, clock.interleave(runs, case.warm_up, case.repeats, say))


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

    def __init__(self, case: Case, sample: cohort.Sample, say=lambda text: None):
        self._case, self.on = case, parallel.devices(case.num_devices)
        self.options = options = step_options(case, sample.data)
        self._step = parallel.compile_train(options, case.parallel, self.on)
        self.key = jax.random.key(0)
        say("ours: initialising")
        self.state = parallel.replicate(fresh_state(options), self.on)
        self._batches = list(parallel.prefetch(sample.batches, self.on))
        valid_time_steps = sum(int(batch["length"].sum()) for batch in sample.batches) if sample.data.use_ehr else 0
        self._lstm_flops = flops.lstm_flops(valid_time_steps, options.model.ehr_hidden)
        self._lengths, self._compiled = sample.plan.padded_length_S.tolist(), {}
        with compilation.counted() as self._compilations:
            for num_steps, batch in zip(self._lengths, self._batches):
                if num_steps not in self._compiled:
                    say(f"ours: compiling for {num_steps} time steps")
                    self._compiled[num_steps] = self._step.lower(self.state, batch, self.key).compile()

    def run(self) -> None:
        """Train on every batch once."""
        self.train(self._batches)

    def train(self, batches) -> None:
        """Train on batches that are already on the devices."""
        for batch in batches:
            self.state, metrics = self._step(self.state, batch, self.key)
        jax.block_until_ready((self.state, metrics))

    def work(self, seconds: float) -> dict:
        """Return FLOPs, FLOP/s and memory of one pass that took `seconds`, and the number of compilations.

        FLOPs per device: XLA's count of the step with the longest padding, lowered for a GPU, plus the LSTM's products
        over the valid time steps, since XLA counts a loop's body once, no matter how often it runs.
        """
        longest = self._batches[int(np.argmax(self._lengths))]
        shapes = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in longest.items()}
        total = len(self._batches) * flops.step_flops(self.options, self.state, shapes)
        total += self._lstm_flops / self._case.num_devices
        best = machine.matrix_flops_per_s(self._case.precision)
        memory = [compiled.memory_analysis() for compiled in self._compiled.values()]
        planned = [
            m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            for m in memory
        ]
        return {
            "tflop_per_repeat_device": round(total / 1e12, 4),
            "tflop_per_s_device": round(total / seconds / 1e12, 4),
            "matrix_tflop_per_s": round(best / 1e12, 4),
            "share_of_matrix_rate": round(total / seconds / best, 4),
            "compilations": self._compilations.number,
            "compile_s": round(self._compilations.seconds, 2),
            "step_memory_gb": round(max(planned) / 1e9, 3),
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
            **dict(case.sizes),
        ),
        optimizer=optim.adam(0.999),
        image=augment.ImageOptions(**config_lib.section("image", resize_px=case.resize_px, crop_px=case.crop_px)),
        weights=losses.Weights(**config_lib.section("loss")),
        mean_F=tuple(data.mean_F.tolist()),
        std_F=tuple(data.std_F.tolist()),
    )


def fresh_state(options: step_lib.StepOptions) -> step_lib.TrainState:
    """Return an initial state, as a run makes it."""
    return step_lib.state_maker(options, run_once=True)(jax.random.key(0, impl="rbg"), 1e-4)


def _peers(case: Case, sample: cohort.Sample, say) -> dict[str, Callable[[], None]]:
    """Return the case's PyTorch peers on the same batches; none without torch or on several devices."""
    if case.num_devices > 1 or not case.peers or importlib.util.find_spec("torch") is None:
        return {}
    from medfuse_jax.bench import torch_peer

    runs = {}
    images = [_ready_images(batch, case) for batch in sample.batches]
    for name in case.peers:
        say(f"{name}: building")
        variant = torch_peer.VARIANTS[name]
        placed = [
            torch_peer.batch_for(variant, batch, image_PCHW, sample.data.mean_F, sample.data.std_F)
            for batch, image_PCHW in zip(sample.batches, images)
        ]
        num_labels = len(sample.data.labels)
        runs[name] = torch_peer.runner(variant, case.method, num_labels, placed, case.precision, dict(case.sizes))
    return runs


def _ready_images(batch: dict, case: Case) -> np.ndarray | None:
    """Return a batch's X-rays as the released data loader does: float32 [P, 3, C, C], ImageNet's statistics."""
    if "image" not in batch:
        return None
    options = augment.ImageOptions(**config_lib.section("image", resize_px=case.resize_px, crop_px=case.crop_px))
    grey_PCC1 = np.asarray(augment.prepare(jnp.asarray(batch["image"][0]), options)[..., :1])
    standardised_PCC3 = (grey_PCC1 - np.array(resnet.IMAGENET_MEAN)) / np.array(resnet.IMAGENET_STD)
    return np.ascontiguousarray(standardised_PCC3.transpose(0, 3, 1, 2), np.float32)
