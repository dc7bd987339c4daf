"""Small models, weights and batches for the model tests, and the released reference where it is.

Shapes: as in medfuse_jax.models.registry.
"""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from medfuse_jax.models import registry
from medfuse_jax.models.model import variable_shapes

NUM_LABELS = 3
TINY = {"resnet_stage_sizes": (1, 1, 1, 1), "resnet_width": 4, "ehr_hidden": 8, "fusion_hidden": 8}
# Two stages compile in half the time of four; the exchange of MMTM and DAFT is then after the first.
TINIER = {**TINY, "resnet_stage_sizes": (1, 1)}

# All methods but those whose code another covers: early, joint and joint_zeros are joint_learnable without its vector;
# mmtm4 and daft4 are mmtm3 and daft3 at another stage.
_ALIKE = ("early", "joint", "joint_zeros", "mmtm4", "daft4")
DISTINCT_METHODS = tuple(name for name in registry.METHODS if name not in _ALIKE)

# Compiled often and run once: the time to optimise a tiny model is not worth its while.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def tiny_model(method: str, **options):
    stage = {"stage": 1} if "stage" in registry.METHODS[method].fields else {}
    return registry.build(method, NUM_LABELS, **TINIER, **stage, **options)


def equations(jaxpr):
    """Return all equations of a program, including those of its loops, calls and kernels."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@functools.cache
def shapes(model) -> dict:
    """Return the shapes of a model's variables, without computing any."""
    return variable_shapes(model)


def random_variables(model, seed: int = 0) -> dict:
    """Return variables without zeros or ones, which could hide an error; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape) * (0.3 if len(leaf.shape) < 2 else leaf.shape[-2] ** -0.5)
        if path[-1].key in ("var", "scale"):
            values = 1 + np.abs(values)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes(model))


def batch(seed: int = 0, rows: int = 4, steps: int = 5, image_rows: tuple[int, ...] = (2, 0), slots: int = 3) -> dict:
    """Return a batch with listed X-rays: `image_rows` have one, the other slots are empty."""
    rng = np.random.default_rng(seed)
    empty = slots - len(image_rows)
    return {
        "ehr": rng.standard_normal((rows, steps, 76)).astype(np.float32),
        "length": np.resize([steps, 2, 4, 1], rows).astype(np.int32),
        "image": rng.standard_normal((slots, 16, 16)).astype(np.float32),
        "image_row": np.array([*image_rows] + [0] * empty, np.int32),
        "image_mask": np.array([True] * len(image_rows) + [False] * empty),
    }


def dense(listed: dict) -> dict:
    """Return the same batch with one image per row."""
    rows = len(listed["length"])
    image_BHW = np.full((rows, *listed["image"].shape[1:]), 7.0, np.float32)
    has_cxr_B = np.zeros(rows, bool)
    for image_HW, row, real in zip(listed["image"], listed["image_row"], listed["image_mask"]):
        if real:
            image_BHW[row], has_cxr_B[row] = image_HW, True
    return {"ehr": listed["ehr"], "length": listed["length"], "image": image_BHW, "has_cxr": has_cxr_B}


def reference_module(root: Path):
    """Return the module that makes the reference's weights and inputs. root: from `real_data`."""
    spec = importlib.util.spec_from_file_location("reference_weights", root / "parity" / "reference_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reference_shapes(root: Path, case: str) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of a released checkpoint."""
    all_shapes = json.loads((root / "parity" / "state_dict_shapes.json").read_text())
    return {name: tuple(shape) for name, shape in all_shapes[case].items()}


def reference_state_dict(root: Path, case: str, seed: int = 0) -> dict[str, np.ndarray]:
    weight = reference_module(root).weight
    return {name: weight(name, shape, seed) for name, shape in reference_shapes(root, case).items()}


def reference_outputs(root: Path, case: str) -> dict[str, np.ndarray]:
    """Return {name: values} of one case, as the released model gave them."""
    with np.load(root / "parity" / "outputs_seed0.npz") as stored:
        prefix = f"{case}/"
        return {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}
