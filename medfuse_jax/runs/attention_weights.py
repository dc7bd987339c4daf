"""What a model with attention weighed in each record, for the predictions file.

Shapes: N records, T time steps, M modalities, R rows of a batch over all devices.
"""

import numpy as np

from medfuse_jax import experiment, parallel
from medfuse_jax import step as step_lib
from medfuse_jax.data import plan as plan_lib


def collect(run: experiment.Experiment, state: step_lib.TrainState, split: str, include_N: np.ndarray) -> dict:
    """The weights of the included records, in record order; {} for a method without attention.

    time_weights float16 [N, T], 0 beyond a stay's length; modality_weights float32 [N, M], 0 for a missing one;
    modalities str [M]; length int [N]. state: on the run's devices. A pass of its own, so that scoring, which
    every epoch does, need not carry them.
    """
    names = getattr(run.options.model, "token_names", ())
    if not names:
        return {}
    length_N = run.dataset.lengths(split)
    found = {
        "time_weights": np.zeros((len(include_N), int(length_N[include_N].max(initial=0))), np.float16),
        "modality_weights": np.zeros((len(include_N), len(names)), np.float32),
    }
    weights_fn = parallel.compile_eval(run.options, run.config.parallel, run.devices, step_lib.weights_step)
    for plan in run.eval_plans(split, include_N):
        for batch in run.batches(split, plan):
            record_R = np.asarray(batch["record"]).reshape(-1)
            real_R = record_R != plan_lib.PADDING
            for name, weight_DBX in weights_fn(state, batch).items():
                width = min(weight_DBX.shape[-1], found[name].shape[1])  # a bucket may be longer than its stays
                weight_RX = np.asarray(weight_DBX).reshape(len(record_R), -1)
                found[name][record_R[real_R], :width] = weight_RX[real_R, :width]
    found["length"] = length_N
    return {name: values_N[include_N] for name, values_N in found.items()} | {"modalities": np.array(names)}
