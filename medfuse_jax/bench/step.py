"""The training step: on batches that lie on the device, and fed as in a run. With its peers in torch.

Shapes: as in `input_pipeline`; S steps of a plan.
"""

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import augment, optim, parallel, schema
from medfuse_jax import feed as feed_lib
from medfuse_jax import step as step_lib
from medfuse_jax.bench import clock, cohort, flops, machine
from medfuse_jax.bench.cases import Case
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models import registry, resnet
from medfuse_jax.models.recurrence import chunks
from medfuse_jax.runtime import compilation

OURS = "ours"


def measure(case: Case, data: batches.Dataset | None = None, say=lambda text: None) -> list[dict]:
    """One record a contender. data: shards to read instead of made-up records."""
    data = data or cohort.dataset(case)
    length_N = data.lengths("train")
    whole = cohort.train_plan(case, data)
    plan = cohort.sample(whole, length_N, case.num_batches)
    say("reading")
    batches = cohort.collate_all(data, plan, case.num_devices)
    trainer = Trainer(case, data, batches, say)
    if case.kind == "feed":
        runs = {"end_to_end": trainer.feed(data, plan), "input": lambda: read(data, plan, case)}
    else:
        runs = torch_runs(case, data, batches, say)
    seconds = clock.interleave({OURS: trainer.run} | runs, case.warm_up, case.repeats, say)
    shared = counts(plan, batches)
    rows = {name: clock.summary(taken) | _rates(shared, taken, case) for name, taken in seconds.items()}
    rows[OURS] |= trainer.facts(rows[OURS]["seconds"]) | padding_facts(whole, length_N)
    for name in runs:
        rows[name]["time_over_ours"] = clock.ratio(seconds[name], seconds[OURS])
    return [{"contender": name} | row for name, row in rows.items()]


def counts(plan: plan_lib.Plan, batches: list[dict]) -> dict:
    """What a repeat holds; time steps as the recurrence runs them: those of each batch's longest series."""
    longest = [int(batch["length"].max()) for batch in batches if "length" in batch]
    return {
        "images_per_batch": plan.images_per_batch,
        "batches_per_repeat": len(plan),
        "samples_per_repeat": int(sum(b["valid"].sum() for b in batches)),
        "images_per_repeat": int(
            sum((b["image_row"] < b["valid"].shape[1]).sum() for b in batches if "image_row" in b)
        ),
        "time_steps_per_repeat": sum(chunks.steps_run(n) for n in longest),
    }


def _rates(shared: dict, seconds: list[float], case: Case) -> dict:
    per_s = 1 / float(np.median(seconds))
    return shared | {
        "samples_per_s": round(shared["samples_per_repeat"] * per_s, 2),
        "samples_per_s_device": round(shared["samples_per_repeat"] * per_s / case.num_devices, 2),
        "images_per_s_device": round(shared["images_per_repeat"] * per_s / case.num_devices, 2),
    }


def padding_facts(plan: plan_lib.Plan, length_N: np.ndarray) -> dict:
    """Over the whole epoch: what padding to a bucket adds, and what the recurrence really runs through."""
    return {
        "steps_per_epoch": len(plan),
        "padded_share_bucket": round(plan_lib.padded_share(plan, length_N), 4),
        "padded_share_run": round(cohort.padded_share_run(plan, length_N, chunks.CHUNK_STEPS[-1]), 4),
    }


class Trainer:
    """Our training step, compiled for a case's batches.

    Keeps its state between repeats: each step goes on from the one before, as in a run.
    """

    def __init__(self, case: Case, data: batches.Dataset, batches: list[dict], say=lambda text: None):
        self._case, self._on = case, parallel.devices(case.num_devices)
        self._options = options = step_options(case, data)
        self._step = parallel.compile_train(options, case.parallel, self._on)
        self._key = jax.random.key(0)
        say("ours: initialising")
        self._state = parallel.replicate(fresh_state(options), self._on)
        self._placed = list(parallel.prefetch(read, self._on))
        self._steps_S = [batch["ehr"].shape[2] if "ehr" in batch else 0 for batch in batches]
        self._recurrence_flops = recurrence_flops(batches, options.model.ehr_hidden) if data.use_ehr else 0.0
        self._compiled = {}
        with compilation.counted() as self._compilations:
            for num_steps, batch in zip(self._steps_S, self._placed):
                if num_steps not in self._compiled:
                    say(f"ours: compiling for {num_steps} steps")
                    # a call finds it compiled
                    self._compiled[num_steps] = self._step.lower(self._state, batch, self._key).compile()

    def run(self) -> None:
        """One pass over the batches on the device."""
        self._train(self._placed)

    def feed(self, data: batches.Dataset, plan: plan_lib.Plan) -> Callable[[], None]:
        """A pass that reads and sends the same batches as a run does, or gathers them where they lie on the device."""
        if self._case.placement == "device":
            return self._gathered(data, plan)

        def run() -> None:
            read = batches.batches(data, "train", plan, num_devices=self._case.num_devices)
            self._train(parallel.prefetch(read, self._on))

        return run

    def _gathered(self, data: batches.Dataset, plan: plan_lib.Plan) -> Callable[[], None]:
        include_N = data.usable("train")
        how = {"mode": self._case.parallel, "placement": "device"}
        feed = feed_lib.open_feed(data, include_N, self._options, self._on, **how)

        def run() -> None:
            for moved in feed(self._state, plan, 0, [len(plan)], self._key):
                self._state = moved[0]
            jax.block_until_ready(moved)

        return run

    def _train(self, placed) -> None:
        for batch in placed:
            self._state, metrics = self._step(self._state, batch, self._key)
        jax.block_until_ready((self._state, metrics))

    def facts(self, seconds: float) -> dict:
        """Work, rate and memory of one pass that took `seconds`, and what was compiled for it.

        FLOPs: XLA's count of the step as a GPU would run it (`costs.step_flops`), in which a loop's body counts once,
        and the recurrence's products over the stays' own steps.
        """
        parts = {  # the batch of a device, one of each length
            num_steps: {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()}
            for num_steps, batch in zip(self._steps_S, self._placed)
        }
        counted = {num_steps: flops.step_flops(self._options, self._state, part) for num_steps, part in parts.items()}
        flops = sum(counted[n] for n in self._steps_S) + self._recurrence_flops / self._case.num_devices
        best = machine.matrix_flops_per_s(self._case.precision)
        memory = [c.memory_analysis() for c in self._compiled.values()]
        planned = [
            m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            for m in memory
        ]
        return {
            "tflop_per_repeat_device": round(flops / 1e12, 4),
            "tflop_per_s_device": round(flops / seconds / 1e12, 4),
            "matrix_tflop_per_s": round(best / 1e12, 4),
            "share_of_matrix_rate": round(flops / seconds / best, 4),
            "compilations": self._compilations.number,
            "compile_s": round(self._compilations.seconds, 2),
            "step_memory_gb": round(max(planned) / 1e9, 3),
            "peak_device_bytes": machine.peak_device_bytes(),
        }


def recurrence_flops(batches: list[dict], width: int) -> float:
    """Products of the EHR encoder's two layers, forward and backward (twice as much), over valid steps."""
    steps = sum(int(batch["length"].sum()) for batch in batches)
    return 3 * 2 * 4 * width * (len(schema.CHANNELS) + 3 * width) * steps


def step_options(case: Case, data: batches.Dataset) -> step_lib.StepOptions:
    return step_lib.StepOptions(
        model=registry.build(case.method, len(data.labels), dtype=jnp.dtype(case.precision), **dict(case.sizes)),
        optimizer=optim.adam(0.999),
        image=augment.ImageOptions(resize_px=case.resize_px, crop_px=case.crop_px),
        mean_F=tuple(data.mean_F.tolist()),
        std_F=tuple(data.std_F.tolist()),
    )


def fresh_state(options: step_lib.StepOptions) -> step_lib.TrainState:
    return step_lib.state_maker(options)(jax.random.key(0, impl="rbg"), 1e-4)


def read(data: batches.Dataset, plan: plan_lib.Plan, case: Case) -> None:
    """Input only: the plan's batches, laid out and let go."""
    for _ in batches.batches(data, "train", plan, num_devices=case.num_devices):
        pass


def torch_runs(case: Case, data: batches.Dataset, batches: list[dict], say) -> dict[str, Callable[[], None]]:
    """The case's peers on the same batches; none where torch is not installed, or for several devices."""
    if case.num_devices > 1 or not case.peers or importlib.util.find_spec("torch") is None:
        return {}
    from medfuse_jax.bench import torch_peer

    runs = {}
    images = [ready_images(batch, case) for batch in batches]
    for name in case.peers:
        say(f"{name}: building")
        variant = torch_peer.VARIANTS[name]
        placed = [
            torch_peer.batch_for(variant, batch, image_PCHW, data.mean_F, data.std_F)
            for batch, image_PCHW in zip(batches, images)
        ]
        runs[name] = torch_peer.runner(variant, case.method, len(data.labels), placed, case.precision, dict(case.sizes))
    return runs


def ready_images(batch: dict, case: Case) -> np.ndarray | None:
    """A batch's X-rays as the released data loader gives them: float32 [P, 3, C, C], ImageNet's statistics."""
    if "image" not in batch:
        return None
    options = augment.ImageOptions(resize_px=case.resize_px, crop_px=case.crop_px)
    grey_PCC1 = np.asarray(augment.prepare(jnp.asarray(batch["image"][0]), options)[..., :1])
    standardised_PCC3 = (grey_PCC1 - np.array(resnet.IMAGENET_MEAN)) / np.array(resnet.IMAGENET_STD)
    return np.ascontiguousarray(standardised_PCC3.transpose(0, 3, 1, 2), np.float32)
