"""The fields of an experiment, their defaults and their limits.

`configs/*.py` start from `default()` and change what makes the experiment. A field that is
not here cannot be set, and `validate` refuses a wrong value before any work is done.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from medfuse_jax import augment, losses, schema
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

# Per stage of pre-training, only what differs from the fusion run is given.
_STAGE_NAMES = ("ehr", "cxr")
# A stage trains an encoder from random weights, on its own.
_NOT_OF_A_STAGE = ("init", "encoders", "pretrain")
# How a run is run: they change none of its numbers, but for rounding. A stopped run may go on with others (and with
# shards in another place: a workdir knows them by their content).
ONLY_HOW = {"placement", "profile_steps", "recurrence"}

_CHOICES = {
    "data.train_stays": ("partial", "paired"),
    "data.val_stays": ("partial", "paired"),
    "data.cxr_task": tuple(name for name, task in schema.TASKS.items() if task.cxr_only),
    "encoders": ("pretrained", "random"),
    "model.missing_cxr": ("", "zeros", "learnt"),
    "image.crop": ("center", "random"),
    "model.batch_norm": ("batch", "frozen"),
    "precision": ("auto", "float32", "bfloat16"),
    "recurrence": ("chunks", "pallas", "cudnn"),
    "parallel": ("pmap", "jit"),
    "placement": ("stream", "device"),
}
_RANGES = {  # the least and, where there is one, the most
    "seed": (0, 2**32 - 1),
    "batch_size": (1,),
    "num_epochs": (1,),
    "learning_rate": (0.0, 1.0),
    "beta2": (0.0, 0.999999),
    "early_stop_epochs": (1,),
    "plateau_epochs": (1,),
    "checkpoint_every_steps": (0,),
    "data.synthetic_stays": (50,),
    "data.synthetic_cxr_fraction": (0.05, 1.0),
    "data.ehr_only_ratio": (0.0, 1.0),
    "data.drop_ehr": (0.0, 1.0),
    "data.drop_cxr": (0.0, 1.0),
    "data.max_buckets": (1, 32),
    "data.order_seed": (-1,),
    "image.resize_px": (32, 1024),
    "image.rotation_deg": (0.0, 180.0),
    "image.translation": (0.0, 1.0),
    "model.dropout": (0.0, 0.99),
    "model.ehr_hidden": (1,),
    "model.fusion_hidden": (1,),
    "model.resnet_width": (1,),
    "eval.batch_size": (1,),
    "eval.num_bootstrap": (1,),
}


def default() -> ConfigDict:
    """Every field with its default: the paper's values (Hayat et al. 2022, 4.4 and A.1), but for the crop of X-rays."""
    config = ConfigDict()
    config.name = "experiment"
    config.task = "pheno"
    config.method = "medfuse"
    config.seed = 0

    config.data = ConfigDict()
    config.data.dir = ""  # '': a synthetic cohort, built once and kept in the user's cache folder
    config.data.synthetic_stays = 1000
    config.data.synthetic_cxr_fraction = 0.19  # of the stays; MIMIC's share
    config.data.train_stays = "partial"  # 'partial': all stays; 'paired': those with an X-ray
    config.data.val_stays = "partial"  # the validation stays that select the model
    config.data.ehr_only_ratio = 1.0  # part of the EHR-only stays drawn each epoch (OPTIMAL: 0.2 / 0.1)
    config.data.drop_ehr = 0.0  # part of the stays with both whose EHR is taken away, in every split
    config.data.drop_cxr = 0.0  # the same of X-rays
    config.data.cxr_task = "radiology"  # whose X-rays and labels train unified's classifier of X-rays
    config.data.statistics = "train"  # or a JSON file with 'mean' and 'std', 76 numbers each
    config.data.max_buckets = 4  # padded lengths, each a compilation
    config.data.order_seed = -1  # of the order of the data; -1: config.seed. A sweep over seeds keeps it

    config.image = ConfigDict()
    for field in dataclasses.fields(augment.ImageOptions):
        config.image[field.name] = field.default

    config.model = ConfigDict()
    config.model.ehr_hidden = 256
    config.model.fusion_hidden = 512
    config.model.dropout = 0.3
    config.model.resnet_stage_sizes = (3, 4, 6, 3)
    config.model.resnet_width = 64
    config.model.batch_norm = "batch"  # 'frozen': keep the pre-trained running statistics
    config.model.modalities = ""  # medfuse: beside EHR and X-ray, 'static' or FILE.py of your own, commas between
    config.model.missing_cxr = ""  # early, joint: 'zeros' or 'learnt' (a vector); '': as the method's name says
    config.model.freeze_encoders = False  # train the fusion alone; 'early' always does

    config.loss = ConfigDict()  # weights of the losses beside the main one, in mmtm and unified
    for field in dataclasses.fields(losses.Weights):
        config.loss[field.name] = field.default

    config.batch_size = 16
    config.images_per_batch = 0  # 0: the share of paired stays
    config.num_epochs = 50
    config.learning_rate = 1e-4
    config.beta2 = 0.999  # the released code has 0.9
    config.early_stop_epochs = 15  # without a better validation AUROC
    config.plateau_epochs = 10  # without a better validation loss, then the rate is halved
    config.checkpoint_every_steps = 0  # 0: at the end of each epoch only

    config.precision = "auto"  # 'bfloat16' on accelerators, 'float32' on CPU
    config.recurrence = "chunks"  # on an NVIDIA GPU also 'pallas' or 'cudnn': the same numbers but for rounding
    config.parallel = "pmap"  # or 'jit' with shardings: the same numbers
    config.placement = "stream"  # or 'device': the train split lies in the accelerator's memory; the same numbers
    config.profile_steps = ""  # 'a:b': a trace of the steps a to b (the first is 1) in <workdir>/profile

    config.eval = ConfigDict()
    config.eval.batch_size = 64
    config.eval.num_bootstrap = 1000

    config.encoders = "pretrained"  # 'random': without the stages of config.pretrain (the paper's RI)
    config.pretrain = ConfigDict()  # 'ehr', 'cxr': what differs from the fields above
    config.init = ConfigDict()
    config.init.ehr = ""  # workdir of a finished run whose encoder to start from, in place of its pre-training
    config.init.cxr = ""
    config.init.model = ""  # or of one whose whole model to start from, in place of all pre-training
    return config


def stages(config: ConfigDict) -> dict[str, ConfigDict]:
    """The pre-training stages, by the encoder they train ('ehr', 'cxr'): none that would be the run itself.

    None at all where the encoders start at random.
    """
    staged = {name: stage(config, name) for name in config.pretrain if config.encoders == "pretrained"}
    return {name: s for name, s in staged.items() if (s.method, s.task) != (config.method, config.task)}


def stage(config: ConfigDict, name: str) -> ConfigDict:
    """The whole config of one pre-training stage."""
    derived = config.copy_and_resolve_references()
    changes = derived.pretrain[name]
    derived.pretrain, derived.init, derived.encoders = ConfigDict(), default().init, default().encoders
    derived.profile_steps = ""
    # The fusion's, not an encoder's: an encoder is pre-trained on every stay, whole, with statistics of its own.
    derived.model.missing_cxr = derived.model.modalities = ""
    derived.model.freeze_encoders, derived.model.batch_norm = False, "batch"
    derived.data.ehr_only_ratio, derived.data.drop_ehr, derived.data.drop_cxr = 1.0, 0.0, 0.0
    derived.loss = default().loss
    derived.update(changes)
    derived.name = f"{config.name}_pretrain_{name}"
    return derived


def validate(config: ConfigDict) -> None:
    """Raises UserError for the first field that is unknown, missing, of the wrong type or out of its range."""
    defaults = default()
    _check_fields(config, defaults, "config")
    _check_complete(config, defaults, "config")
    _check_task(config)
    from medfuse_jax.models import registry  # late: importing flax takes a second that --help need not pay

    check_choice("config.method", config.method, registry.METHODS)
    for field, allowed in _CHOICES.items():
        check_choice(f"config.{field}", _value(config, field), allowed)
    _check_of_method(config, registry.METHODS)
    profile_steps(config)
    for field, limits in _RANGES.items():
        _check_range(f"config.{field}", _value(config, field), *limits)
    _check_sizes(config)
    _check_losses(config, registry.METHODS, defaults.loss)
    _check_init(config)
    _check_stages(config)


def _check_task(config: ConfigDict) -> None:
    if config.task not in schema.TASKS:
        check_choice("config.task", config.task, schema.TRAINABLE_TASKS)
    if config.task not in schema.TRAINABLE_TASKS:
        raise UserError(
            f"config.task is {config.task!r}, whose labels are per step: its data can be built and read, but not "
            f"trained on yet; choose one of {', '.join(schema.TRAINABLE_TASKS)}"
        )


def _check_of_method(config: ConfigDict, methods: dict) -> None:
    """What only some methods have is refused for the others."""
    from medfuse_jax.data.modalities import loading  # late, as methods are

    method = methods[config.method].model_class
    if config.model.missing_cxr and not hasattr(method, "missing"):
        raise UserError(
            f"config.model.missing_cxr is {config.model.missing_cxr!r}, and the method {config.method!r} puts "
            "nothing in a missing X-ray's place: leave it out, or take early or joint"
        )
    if config.model.freeze_encoders and not hasattr(method, "frozen_encoders"):
        raise UserError(
            f"config.model.freeze_encoders is true, and the method {config.method!r} has no fusion that could be "
            f"trained alone: set it to false, or take {' or '.join(_with(methods, 'frozen_encoders'))}"
        )
    if loading.load(config.model.modalities) and not hasattr(method, "modalities"):
        raise UserError(
            f"config.model.modalities is {config.model.modalities!r}, and the method {config.method!r} fuses EHR and "
            f"X-ray alone: leave it out, or take {' or '.join(_with(methods, 'modalities'))}"
        )


def _with(methods: dict, field: str) -> list[str]:
    """The methods whose model has the field."""
    return [name for name, row in methods.items() if hasattr(row.model_class, field)]


def _check_sizes(config: ConfigDict) -> None:
    """The ranges that depend on another field, and those of several numbers."""
    _check_range("config.images_per_batch", config.images_per_batch, 0, config.batch_size)
    _check_range("config.image.crop_px", config.image.crop_px, 32, config.image.resize_px)
    if len(config.image.scale) != 2 or not 0.1 <= config.image.scale[0] <= config.image.scale[1] <= 10:
        raise UserError(f"config.image.scale is {config.image.scale}; give the least and the most, between 0.1 and 10")
    if len(config.model.resnet_stage_sizes) != 4 or min(config.model.resnet_stage_sizes) < 1:
        raise UserError(f"config.model.resnet_stage_sizes is {config.model.resnet_stage_sizes}; give four numbers >= 1")


def _check_losses(config: ConfigDict, methods: dict, defaults: ConfigDict) -> None:
    for name, weight in config.loss.items():
        _check_range(f"config.loss.{name}", weight, 0.0, 1e6)
        read_by = [method for method, row in methods.items() if name in row.model_class.loss_weights()]
        if weight != defaults[name] and config.method not in read_by:
            raise UserError(
                f"config.loss.{name} is {weight}, and the method {config.method!r} has no such loss: leave it out, or "
                f"take {' or '.join(read_by)}"
            )


def _check_init(config: ConfigDict) -> None:
    if config.init.model and (beside := [name for name in _STAGE_NAMES if config.init[name]]):
        raise UserError(
            f"config.init.model is {config.init.model!r}, a whole model, and config.init.{beside[0]} is "
            f"{config.init[beside[0]]!r}, for a part of it: leave one of them out"
        )


def _check_stages(config: ConfigDict) -> None:
    for name in config.pretrain:
        check_choice("config.pretrain stage", name, _STAGE_NAMES)
        for field in _NOT_OF_A_STAGE:
            if field in config.pretrain[name]:
                raise UserError(
                    f"config.pretrain.{name}.{field} is given, and a stage starts at random: train it as a run of its "
                    f"own, with config.init there, and give that run here as config.init.{name}"
                )
        try:
            validate(stage(config, name))
        except UserError as error:
            raise UserError(f"in config.pretrain.{name}: {error}") from None


def profile_steps(config: ConfigDict) -> tuple[int, int]:
    """(first, last) of the steps to profile, (0, 0) for none; UserError where the field is neither."""
    if not config.profile_steps:
        return 0, 0
    first, _, last = config.profile_steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"config.profile_steps is {config.profile_steps!r}; give the first and last step, such as '20:25' (the "
            "first of a run is 1)"
        )
    return int(first), int(last)


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """Raises UserError where batches do not divide over the devices."""
    for field, size in (("config.batch_size", config.batch_size), ("config.eval.batch_size", config.eval.batch_size)):
        if size % num_devices:
            near = max(1, round(size / num_devices)) * num_devices
            raise UserError(f"{field} is {size}, not a multiple of the {num_devices} devices; {near} would do")


def save(config: ConfigDict, path: Path) -> None:
    """Writes the resolved config as JSON."""
    content = config.copy_and_resolve_references().to_dict()
    files.write_text(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def load(path: Path) -> ConfigDict:
    """Reads what `save` wrote; UserError where it is missing or not a config."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {path.parent} is not the workdir of a run") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); start the run anew in another --workdir") from None
    try:
        if not isinstance(content, dict):
            raise UserError("it holds no fields")
        config = ConfigDict({"recurrence": "chunks"} | _lists_to_tuples(content))  # older runs had no other
        validate(config)
    except UserError as error:
        raise UserError(f"{path} is of another version or was edited: {error}") from None
    return config


def difference(a: ConfigDict, b: ConfigDict, ignored: Iterable[str] = ()) -> str:
    """'field is value in a there and value in b here' for the first field in which two configs differ, '' for none.

    Task and method come before all others, most of which follow from them. Fields that change no number of a run, but
    for rounding, are no difference, nor are the `ignored` ones.
    """
    flat_a, flat_b = (flat(c) for c in (a, b))
    fields = (flat_a.keys() | flat_b.keys()) - ONLY_HOW - {"data.dir", *ignored}
    differing = sorted(f for f in fields if flat_a.get(f) != flat_b.get(f))
    if not differing:
        return ""
    first = next((f for f in ("task", "method") if f in differing), differing[0])
    others = [f"config.{f}" for f in differing if f != first]
    more = f" (also: {', '.join(others[:3])}{', ...' if others[3:] else ''})" if others else ""
    return f"config.{first} is {flat_a.get(first)} there and {flat_b.get(first)} here{more}"


def flat(config: ConfigDict) -> dict:
    """Every field by its dotted name, values as JSON has them."""
    return _flat(json.loads(json.dumps(config.copy_and_resolve_references().to_dict())))


def _flat(content: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in content.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _lists_to_tuples(value):
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _check_fields(config: ConfigDict, allowed: ConfigDict, where: str) -> None:
    for key in config:
        if key not in allowed:
            near = difflib.get_close_matches(key, list(allowed), n=1, cutoff=0.5)
            hint = f" Did you mean {where}.{near[0]}?" if near else f" There are: {', '.join(sorted(allowed))}."
            raise UserError(f"{where}.{key} is not a field of a config.{hint}")
        if key == "pretrain":
            _check_section(config.pretrain, _STAGE_NAMES, f"{where}.pretrain")
            for name in [name for name in config.pretrain if name in _STAGE_NAMES]:
                of_a_stage = [field for field in allowed if field not in _NOT_OF_A_STAGE]
                _check_section(config.pretrain[name], of_a_stage, f"{where}.pretrain.{name}")
                _check_fields(config.pretrain[name], allowed, f"{where}.pretrain.{name}")
        elif isinstance(allowed[key], ConfigDict):
            _check_section(config[key], allowed[key], f"{where}.{key}")
            _check_fields(config[key], allowed[key], f"{where}.{key}")
        elif not _same_kind(config[key], allowed[key]):
            kind = type(allowed[key]).__name__
            raise UserError(f"{where}.{key} is {config[key]!r}, a {type(config[key]).__name__}; it must be a {kind}")


def _check_section(value, fields: Iterable[str], where: str) -> None:
    if not isinstance(value, ConfigDict):
        raise UserError(f"{where} is {value!r}; it must hold the fields {', '.join(fields)}")


def _check_complete(config: ConfigDict, wanted: ConfigDict, where: str) -> None:
    for key in wanted:
        if key not in config:
            raise UserError(f"{where}.{key} is missing")
        if isinstance(wanted[key], ConfigDict):
            _check_complete(config[key], wanted[key], f"{where}.{key}")


def _same_kind(value, example) -> bool:
    if isinstance(example, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is type(example)


def _value(config: ConfigDict, field: str):
    return functools.reduce(lambda section, name: section[name], field.split("."), config)


def _check_range(field: str, value: float, low: float, high: float = float("inf")) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise UserError(f"{field} is {value}; it must be {limits}")
