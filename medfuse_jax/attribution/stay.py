"""Explain one stay's score: read its record as a batch, and find how much each time step and X-ray adds to the score.

Shapes: T time steps, F EHR channel, V variables, P images, C side of an image as the model sees it, K labels.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medfuse_jax import evaluate, records, schema
from medfuse_jax import step as step_lib
from medfuse_jax.attribution import methods
from medfuse_jax.attribution.result import Attribution
from medfuse_jax.data import batches
from medfuse_jax.data import plan as plan_lib
from medfuse_jax.models.precision import matmul_precision
from medfuse_jax.run import Run
from medfuse_jax.runs import sources
from medfuse_jax.runtime.errors import UserError, check_choice

_PATCHES = 7  # a patch's side is a seventh of the image's, and it moves by half of that


def explain(workdir: Path, stay_id: int, label: str = "", data_dir: str = "", cxr_features: str = "") -> Attribution:
    """Return what a run's score of a stay rests on; in an hourly task, its score at the last hour.

    Time series: integrated gradients, from a baseline of the same length with 0 in every standardised channel. There,
    each continuous variable has the mean of the training stays, no class is set, and nothing is marked as observed.
    X-rays: occlusion. Further modalities keep their values.
    label: by default the one with the highest score. data_dir, cxr_features: as for `evaluate.evaluate`. Raises
    UserError if the stay is not in the run's shards, or the method cannot score it.
    """
    run = sources.reopen(workdir, None, data_dir, cxr_features)
    if run.dataset.task.cxr_only:
        message = f"{workdir} has the task {run.config.task}, whose X-rays have no stay"
        raise UserError(f"{message}: give a run of another task", field="--workdir", path=workdir)
    if label:
        check_choice("--label", label, run.dataset.labels)
    split, number = _find(run, stay_id)
    state, _ = evaluate.restore(run, workdir)
    batch = _batch(run, split, number)
    # Plain float32: the shares must add up.
    model = run.options.model.clone(dtype=jnp.float32, recurrence="chunks")
    inputs = step_lib.model_inputs(run.options, batch, key=None)
    last = int(batch["hour_mask"].sum()) - 1 if "hour_mask" in batch else None
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def logits(changed: dict):
        out = model.apply(variables, **(inputs | changed), train=False)[run.options.head]
        return out[0] if last is None else out[0, last]

    logit_K = np.asarray(logits({}))
    k = run.dataset.labels.index(label) if label else int(logit_K.argmax())
    with matmul_precision(jnp.float32):  # for the gradients; the model sets its own
        ehr_TF, baseline, gap = _series(logits, inputs, int(batch.get("length", [0])[0]), k)
    image_PCC, shown_PCC = _images(logits, inputs, batch, k)
    hour = None
    if last is not None:
        hours = run.dataset.hours[split]
        hour = float(hours.time_h_S[hours.first_N[number] + last])
    return Attribution(
        stay_id=stay_id,
        task=run.config.task,
        method=run.config.method,
        label=run.dataset.labels[k],
        score=float(logit_K[k]),
        baseline=baseline,
        gap=gap,
        ehr_TF=ehr_TF,
        image_PCC=image_PCC,
        shown_PCC=shown_PCC,
        timestep_h=float(records.manifest(run.config.data.dir, run.config.task)["timestep_h"]),
        hour=hour,
    )


def _find(run: Run, stay_id: int) -> tuple[str, int]:
    """Return the split of a stay and its record's number."""
    for split in schema.SPLITS:
        places = np.flatnonzero(run.dataset.index[split]["stay_id"] == stay_id)
        if len(places) and not run.dataset.usable(split)[places[0]]:
            message = f"--stay={stay_id}: it lacks a modality that the method {run.config.method} needs for a score"
            raise UserError(message, field="--stay", value=stay_id)
        if len(places):
            return split, int(places[0])
    folder = Path(run.config.data.dir) / run.config.task
    raise UserError(f"--stay={stay_id}: {folder} has no such stay", field="--stay", path=folder, value=stay_id)


def _batch(run: Run, split: str, number: int) -> dict:
    """Return a batch of one record, without the devices' axis."""
    dataset = run.dataset
    include_N = np.arange(len(dataset.lengths(split))) == number
    (plan,) = plan_lib.eval_plans(
        dataset.lengths(split),
        dataset.paired(split),
        include_N,
        batch_size=1,
        buckets=dataset.buckets,
        packing=dataset.packing(split),
    )
    batch = batches.read(dataset, split, plan_lib.deal(plan, 0, 1), int(plan.padded_length_S[0]))
    return {name: values[0] for name, values in batch.items()}


def _series(logits, inputs: dict, length: int, k: int) -> tuple[np.ndarray, float, float]:
    """Return the shares [T, F] of the stay's own time steps, the baseline's score and the gap."""
    if "ehr" not in inputs or not length:
        return np.zeros((0, len(schema.CHANNELS)), np.float32), float(logits({})[k]), 0.0
    series = np.asarray(inputs["ehr"])
    baseline = np.zeros_like(series)
    share_1TF, gap = methods.integrated_gradients(lambda ehr: logits({"ehr": ehr})[k], series, baseline)
    return share_1TF[0, :length], float(logits({"ehr": baseline})[k]), gap


def _images(logits, inputs: dict, batch: dict, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the occlusion and the grey values [P, C, C] of the stay's X-rays."""
    slots = np.flatnonzero(batch.get("image_mask", np.zeros(0, bool)))
    if "image" not in inputs or not len(slots):
        return np.zeros((0, 0, 0), np.float32), np.zeros((0, 0, 0), np.float32)
    image = jnp.asarray(inputs["image"])
    patch_px = max(image.shape[1] // _PATCHES, 1)

    def score(p: int):
        return lambda grey_CC: logits({"image": image.at[p, :, :, 0].set(grey_CC)})[k]

    found = [methods.occlusion(score(p), image[p, :, :, 0], patch_px, max(patch_px // 2, 1)) for p in slots.tolist()]
    return np.stack(found), np.asarray(image[slots, :, :, 0])
