"""The fields of a config, each one row of `FIELDS`, where all other code looks them up.

Each of `configs/*.py` starts from `default()` and sets what differs. To add a field, add a row (see
CONTRIBUTING.md): it can then be set by flag, is validated, saved, compared on resume and listed in docs/config.md.
`python -m medfuse_jax.config` prints that list.
"""

import dataclasses
import difflib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

try:
    from ml_collections import ConfigDict, config_dict
except ModuleNotFoundError:  # the benchmark reads the defaults on machines with only jax, flax and optax
    ConfigDict = config_dict = None  # type: ignore[assignment, misc]

from medfuse_jax import schema
from medfuse_jax.models import registry
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

PRETRAIN_STAGES = ("ehr", "cxr")
_INFINITY = float("inf")


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field.

    default: also gives the field's type. help: one line. choices, or low and high: the values allowed.
    execution_only: the value changes results only by rounding, so a stopped run may resume with another.
    searchable: whether a sweep may vary it.
    affects_features: whether the features of a frozen encoder may depend on it.
    fusion_only: only the fusion run uses its value. A pre-training stage has the default unless its section sets it.
    """

    default: object
    help: str
    choices: tuple[str, ...] = ()
    low: float = -_INFINITY
    high: float = _INFINITY
    execution_only: bool = False
    searchable: bool = True
    affects_features: bool = True
    fusion_only: bool = False


_shared = functools.partial(Field, searchable=False)
_fusion = functools.partial(Field, fusion_only=True)
_training = functools.partial(Field, affects_features=False)  # how the fusion is trained
_execution = functools.partial(Field, execution_only=True, searchable=False)

# Defaults are the paper's values (Hayat et al. 2022, 4.4 and A.1), except where the help says otherwise.
FIELDS = {
    "name": _shared("experiment", "name of the run in reports"),
    "task": _shared("pheno", "what is predicted", choices=schema.TRAINABLE_TASKS),
    "method": _training("medfuse", "the model", choices=tuple(registry.METHODS)),
    "seed": _training(0, "of initial weights, dropout, augmentation and data order", low=0, high=2**32 - 1),
    "data.dir": _shared("", "folder of the shards; '': a synthetic cohort, built once and cached"),
    "data.synthetic_stays": _shared(1000, "stays of the synthetic cohort", low=50),
    "data.synthetic_cxr_fraction": _shared(0.19, "its fraction of stays with an X-ray; MIMIC's", low=0.05, high=1.0),
    "data.train_stays": _fusion(
        "partial", "training stays: 'partial': all; 'paired': those with EHR and X-ray", choices=("partial", "paired")
    ),
    "data.val_stays": _fusion(
        "partial", "validation stays that select the model", choices=("partial", "paired"), searchable=False
    ),
    "data.ehr_only_ratio": _fusion(
        1.0, "fraction of EHR-only stays drawn each epoch (OPTIMAL: 0.2 / 0.1)", low=0, high=1, affects_features=False
    ),
    "data.drop_ehr": _fusion(
        0.0, "fraction of paired stays whose EHR is dropped, in every split", low=0, high=1, searchable=False
    ),
    "data.drop_cxr": _fusion(
        0.0, "fraction of paired stays whose X-ray is dropped, in every split", low=0, high=1, searchable=False
    ),
    "data.cxr_task": Field(
        "radiology",
        "task whose X-rays and labels train unified's X-ray classifier",
        choices=tuple(name for name, task in schema.TASKS.items() if task.cxr_only),
    ),
    "data.statistics": Field("train", "EHR mean and std: 'train' split's, or a JSON file with 'mean' and 'std'"),
    "data.max_buckets": Field(4, "padded lengths; each costs a compilation", low=1, high=32),
    "data.order_seed": _shared(-1, "of the data order alone; -1: seed", low=-1),
    "image.resize_px": Field(256, "side after resizing", low=32, high=1024),
    "image.crop_px": Field(224, "side of the network's input, at most resize_px", low=32, high=1024),
    "image.crop": Field(
        "center", "in training: 'center' as released, 'random' as the paper says", choices=("center", "random")
    ),
    "image.flip": Field(True, "flip horizontally with probability 0.5 in training"),
    "image.rotation_deg": Field(45.0, "largest rotation either way in training", low=0, high=180),
    "image.scale": Field((0.85, 1.15), "smallest and largest scale in training, between 0.1 and 10"),
    "image.translation": Field(0.15, "largest translation in training, as a fraction of the side", low=0, high=1),
    "model.ehr_hidden": Field(256, "units of each LSTM layer of the EHR encoder", low=1),
    "model.fusion_hidden": _training(512, "units of the fusion LSTM", low=1),
    "model.dropout": _training(0.3, "dropout rate of the EHR features", low=0, high=0.99),
    "model.resnet_stage_sizes": Field((3, 4, 6, 3), "blocks of each ResNet stage; (3, 4, 6, 3) is ResNet-34"),
    "model.resnet_width": Field(64, "channels of the first ResNet stage", low=1),
    "model.batch_norm": _fusion(
        "batch", "statistics in training: of the 'batch', or 'frozen' pre-trained ones", choices=("batch", "frozen")
    ),
    "model.modalities": _fusion("", "further modalities of medfuse: 'static' or FILE.py of yours, comma-separated"),
    "model.missing_cxr": _fusion(
        "",
        "features of a missing X-ray in early and joint: 'zeros' or 'learnt'; '': as the method's name says",
        choices=("", "zeros", "learnt"),
        affects_features=False,
    ),
    "model.freeze_encoders": _fusion(False, "train the fusion alone; 'early' always does", affects_features=False),
    "loss.ehr_only": _fusion(1.0, "weight of the EHR classifier's loss (mmtm, unified)", low=0, high=1e6),
    "loss.cxr_only": _fusion(1.0, "weight of the X-ray classifier's loss (mmtm, unified)", low=0, high=1e6),
    "loss.align": _fusion(0.0, "weight of the alignment loss (mmtm); 0 as released", low=0, high=1e6),
    "batch_size": _training(16, "rows of a training batch, over all devices", low=1),
    "images_per_batch": _training(0, "image slots of a batch, at most batch_size; 0: share of paired stays", low=0),
    "num_epochs": _training(50, "epochs at most", low=1),
    "learning_rate": _training(1e-4, "Adam's", low=0, high=1),
    "beta2": _training(0.999, "Adam's; the released code has 0.9", low=0, high=0.999999),
    "early_stop_epochs": _training(15, "stop after so many epochs without a better validation AUROC", low=1),
    "plateau_epochs": _training(10, "halve the rate after so many epochs without a better validation loss", low=1),
    "checkpoint_every_steps": _training(0, "0: at the end of each epoch only", low=0),
    "precision": Field(
        "auto", "of products; 'auto': bfloat16, but float32 on CPU", choices=("auto", "float32", "bfloat16")
    ),
    "recurrence": _execution(
        "chunks", "how the LSTM is computed; the last two on NVIDIA GPUs", choices=("chunks", "pallas", "cudnn")
    ),
    "parallel": _execution("pmap", "how a step is divided over devices", choices=("pmap", "jit")),
    "placement": _execution(
        "stream", "'device': the training split is held in device memory", choices=("stream", "device")
    ),
    "profile_steps": _execution("", "'a:b': trace steps a to b (from 1) into <workdir>/profile", fusion_only=True),
    "eval.batch_size": _shared(64, "rows of an evaluation batch", low=1),
    "eval.num_bootstrap": _shared(1000, "resamples of the confidence intervals", low=1),
    "encoders": _shared(
        "pretrained",
        "'random': skip the stages of config.pretrain (the paper's RI)",
        choices=("pretrained", "random"),
        fusion_only=True,
    ),
    "init.ehr": _shared("", "workdir of a finished run whose EHR encoder to start from", fusion_only=True),
    "init.cxr": _shared("", "workdir of a finished run whose X-ray encoder to start from", fusion_only=True),
    "init.model": _shared("", "workdir of a finished run whose whole model to start from", fusion_only=True),
}
# Fields that a stage lacks, because it trains one encoder alone, from random weights.
_NOT_OF_A_STAGE = ("name", "encoders", "init.ehr", "init.cxr", "init.model")


def default() -> ConfigDict:
    """Return a config with every field at its default, and no pre-training."""
    config = _nested({name: field.default for name, field in FIELDS.items()})
    config.pretrain = ConfigDict()
    return config


def pretraining(**fields) -> ConfigDict:
    """Return a section for config.pretrain.ehr or .cxr: what differs from the fusion run; all else is inherited.

    Every field can be set by flag, as in --config.pretrain.ehr.data.train_stays=paired.
    """
    unset = {name: config_dict.placeholder(type(FIELDS[name].default)) for name in _stage_fields()}
    section = _nested(unset)
    section.update(fields)
    return section


def section(name: str, **changes) -> dict:
    """Return the default fields of a section such as 'image', with changes."""
    prefix = f"{name}."
    fields = {n.removeprefix(prefix): field.default for n, field in FIELDS.items() if n.startswith(prefix)}
    assert not changes.keys() - fields.keys(), f"no such field of {name}: {sorted(changes.keys() - fields.keys())}"
    return fields | changes


def names(**properties: bool) -> frozenset[str]:
    """Return the fields whose row has these properties, as in names(searchable=True)."""
    return frozenset(n for n, f in FIELDS.items() if all(getattr(f, p) == v for p, v in properties.items()))


def is_execution_only(name: str) -> bool:
    """Return whether a field, of the run or of one of its stages, changes results by rounding at most."""
    return name.removeprefix("pretrain.ehr.").removeprefix("pretrain.cxr.") in names(execution_only=True)


def stages(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the pre-training stages by the encoder they train ('ehr', 'cxr'), except any equal to the run itself."""
    if config.encoders != "pretrained":
        return {}
    staged = {name: stage(config, name) for name in config.pretrain}
    return {name: s for name, s in staged.items() if (s.method, s.task) != (config.method, config.task)}


def stage(config: ConfigDict, name: str) -> ConfigDict:
    """Return the whole config of a stage: its section, the defaults of fusion_only fields, the run's other fields."""
    derived = config.copy_and_resolve_references()
    derived.pretrain = ConfigDict()
    derived.update_from_flattened_dict({n: FIELDS[n].default for n in names(fusion_only=True)})
    derived.update_from_flattened_dict(dict(_flatten(_set_fields(config.pretrain[name]))))
    derived.name = f"{config.name}_pretrain_{name}"
    return derived


def validate(config: ConfigDict) -> None:
    """Raise UserError for the first field that is unknown, missing, of the wrong type or out of range."""
    content = _set_fields(config)
    if "pretrain" not in content:
        raise UserError("config.pretrain is missing", field="config.pretrain")
    pretrain = content.pop("pretrain")
    _check_fields(content, FIELDS, "config")
    given = dict(_flatten(content))
    if missing := [name for name in FIELDS if name not in given]:
        raise UserError(f"config.{missing[0]} is missing", field=f"config.{missing[0]}")
    profile_steps(config)
    _check_sizes(config)
    _check_method(config)
    _check_init(config)
    if not isinstance(pretrain, dict):
        raise _not_a_section("config.pretrain", pretrain, PRETRAIN_STAGES)
    for name, section in pretrain.items():
        check_choice("config.pretrain stage", name, PRETRAIN_STAGES)
        _check_stage_section(section, f"config.pretrain.{name}")
        try:
            validate(stage(config, name))
        except UserError as error:
            what, where = f"in config.pretrain.{name}: {error}", f"config.pretrain.{name}"
            field = error.field.replace("config", where, 1)
            raise UserError(what, field=field, value=error.value, nearest=error.nearest) from None


def _check_fields(content: dict, allowed: Iterable[str], where: str) -> None:
    for name, value in _flatten(content):
        if name in allowed:
            _check_value(f"{where}.{name}", value, FIELDS[name])
            continue
        if inside := [field for field in allowed if field.startswith(f"{name}.")]:
            raise _not_a_section(f"{where}.{name}", value, inside)
        near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
        hint = f"Did you mean {where}.{near[0]}?" if near else f"There are: {', '.join(allowed)}."
        what = f"{where}.{name} is not a field of a config. {hint}"
        raise UserError(what, field=f"{where}.{name}", nearest=near[0] if near else "")


def _check_stage_section(section, where: str) -> None:
    if not isinstance(section, dict):
        raise _not_a_section(where, section, _stage_fields())
    for field in ("encoders", "init", "pretrain"):
        if field in section:
            raise UserError(
                f"{where}.{field} is given, but a stage starts from random weights: train it as a run of its own and "
                f"give that run as config.init.{where.rpartition('.')[2]}",
                field=f"{where}.{field}",
            )
    _check_fields(section, _stage_fields(), where)


def _stage_fields() -> list[str]:
    return [name for name in FIELDS if name not in _NOT_OF_A_STAGE]


def _not_a_section(where: str, value, fields: Iterable[str]) -> UserError:
    return UserError(f"{where} is {value!r}; it must hold the fields {', '.join(fields)}", field=where, value=value)


def _check_value(where: str, value, field: Field) -> None:
    wanted = type(field.default)
    is_number = wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(value) is not wanted and not is_number:
        what = f"{where} is {value!r}, a {type(value).__name__}; it must be a {wanted.__name__}"
        raise UserError(what, field=where, value=value)
    if where == "config.task" and value in schema.TASKS and value not in schema.TRAINABLE_TASKS:
        raise UserError(
            f"config.task is {value!r}, which has labels at many times of a stay: it can be built and read, but not "
            f"trained on yet; choose one of {', '.join(schema.TRAINABLE_TASKS)}",
            field=where,
            value=value,
        )
    if field.choices:
        check_choice(where, value, field.choices)
    if wanted in (int, float):
        _check_range(where, value, field.low, field.high)


def _check_range(where: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == _INFINITY else f"between {low} and {high}"
        raise UserError(f"{where} is {value}; it must be {limits}", field=where, value=value)


def _check_sizes(config: ConfigDict) -> None:
    """Check ranges that depend on another field, and fields of several numbers."""
    _check_range("config.images_per_batch", config.images_per_batch, 0, config.batch_size)
    _check_range("config.image.crop_px", config.image.crop_px, 32, config.image.resize_px)
    scale, sizes = config.image.scale, config.model.resnet_stage_sizes
    if len(scale) != 2 or not 0.1 <= scale[0] <= scale[1] <= 10:
        what = f"config.image.scale is {scale}; give the smallest and the largest, between 0.1 and 10"
        raise UserError(what, field="config.image.scale", value=scale)
    if len(sizes) != 4 or min(sizes) < 1:
        what = f"config.model.resnet_stage_sizes is {sizes}; give four numbers of at least 1"
        raise UserError(what, field="config.model.resnet_stage_sizes", value=sizes)


def _check_method(config: ConfigDict) -> None:
    """Refuse fields that the method does not read."""
    method, model = registry.METHODS[config.method], config.model
    for field, value, model_field in (
        ("model.missing_cxr", model.missing_cxr, "missing"),
        ("model.freeze_encoders", model.freeze_encoders, "frozen_encoders"),
        ("model.modalities", model.modalities, "modalities"),
    ):
        if value and not method.has_field(model_field):
            raise UserError(
                f"config.{field} is {value!r}, which the method {config.method!r} does not read: leave it out, or use "
                f"{' or '.join(registry.with_field(model_field))}",
                field=f"config.{field}",
                value=value,
            )
    if model.modalities:
        from medfuse_jax.data.modalities import loading  # late: imports flax

        loading.load(model.modalities)
    for name, weight in config.loss.items():
        if weight != FIELDS[f"loss.{name}"].default and name not in method.model_class.loss_weights():
            readers = [m for m, row in registry.METHODS.items() if name in row.model_class.loss_weights()]
            raise UserError(
                f"config.loss.{name} is {weight}, and the method {config.method!r} has no such loss: leave it out, or "
                f"use {' or '.join(readers)}",
                field=f"config.loss.{name}",
                value=weight,
            )


def _check_init(config: ConfigDict) -> None:
    if config.init.model and (others := [name for name in PRETRAIN_STAGES if config.init[name]]):
        raise UserError(
            f"config.init.model is {config.init.model!r}, a whole model, and config.init.{others[0]} is "
            f"{config.init[others[0]]!r}, a part of one: leave one of them out",
            field="config.init.model",
        )


def profile_steps(config: ConfigDict) -> tuple[int, int]:
    """Return the first and last step to profile, or (0, 0) for none."""
    if not config.profile_steps:
        return 0, 0
    first, _, last = config.profile_steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"config.profile_steps is {config.profile_steps!r}; give the first and last step, such as '20:25' (a run's "
            "first step is 1)",
            field="config.profile_steps",
            value=config.profile_steps,
        )
    return int(first), int(last)


def check_devices(config: ConfigDict, num_devices: int) -> None:
    """Raise UserError unless batches divide evenly over the devices."""
    for field, size in (("config.batch_size", config.batch_size), ("config.eval.batch_size", config.eval.batch_size)):
        if size % num_devices:
            low = size // num_devices * num_devices
            choices = " or ".join(str(n) for n in (low, low + num_devices) if n)
            what = f"{field} is {size}, not divisible by {num_devices} devices; use {choices}"
            raise UserError(what, field=field, value=size)


def save(config: ConfigDict, path: Path) -> None:
    """Write the resolved config as JSON, without the fields of a stage that are not set."""
    files.write_json(path, _set_fields(config.copy_and_resolve_references()))


def load(path: Path) -> ConfigDict:
    """Read what `save` wrote; raise UserError if it is missing or not a valid config."""
    content = files.read_json(path, f"{path.parent} is not the workdir of a run, or was damaged: use another --workdir")
    config = ConfigDict(_lists_to_tuples(content))
    try:
        validate(config)
    except UserError as error:
        what = f"{path} is of another version or was edited: {error}"
        raise UserError(what, field=error.field, path=path, value=error.value) from None
    return config


def difference(a: ConfigDict, b: ConfigDict, ignored: Iterable[str] = ()) -> str:
    """Describe the first field in which two configs differ: 'field is X there and Y here', or '' for none.

    Task and method come first: most other differences follow from them. Execution-only fields, data.dir and the
    `ignored` fields are not compared.
    """
    flat_a, flat_b = (flat(c) for c in (a, b))
    fields = {name for name in flat_a.keys() | flat_b.keys() if not is_execution_only(name)} - {"data.dir", *ignored}
    differing = sorted(f for f in fields if flat_a.get(f) != flat_b.get(f))
    if not differing:
        return ""
    first = next((f for f in ("task", "method") if f in differing), differing[0])
    others = [f"config.{f}" for f in differing if f != first]
    more = f" (also: {', '.join(others[:3])}{', ...' if others[3:] else ''})" if others else ""
    return f"config.{first} is {flat_a.get(first)} there and {flat_b.get(first)} here{more}"


def flat(config: ConfigDict) -> dict:
    """Return every field that is set, by its dotted name, with values as JSON has them."""
    return dict(_flatten(json.loads(json.dumps(_set_fields(config.copy_and_resolve_references())))))


def get(config: ConfigDict, name: str):
    """Return the value of a field by its dotted name."""
    return functools.reduce(lambda part, key: part[key], name.split("."), config)


def table() -> str:
    """Return the Markdown table of docs/config.md: one row per field."""
    lines = ["| field | default | values | | sweep | resume |", "|---|---|---|---|---|---|"]
    for name, field in FIELDS.items():
        marks = f"{'yes' if field.searchable else ''} | {'yes' if field.execution_only else ''}"
        lines.append(f"| `{name}` | `{field.default!r}` | {_values(field)} | {field.help} | {marks} |")
    return "\n".join(lines)


def describe() -> str:
    """Return one line per field, for --help."""
    return "\n".join(f"  --config.{name}={f.default!r}  {f.help}" for name, f in FIELDS.items())


def _values(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{choice or repr(choice)}`" for choice in field.choices)
    if field.low > -_INFINITY and field.high < _INFINITY:
        return f"{field.low:g} to {field.high:g}"
    return f"at least {field.low:g}" if field.low > -_INFINITY else ""


def _nested(fields: dict) -> ConfigDict:
    config = ConfigDict()
    for name, value in fields.items():
        *sections, key = name.split(".")
        part = config
        for section_name in sections:
            if section_name not in part:
                part[section_name] = ConfigDict()
            part = part[section_name]
        part[key] = value
    return config


def _set_fields(config: ConfigDict, is_pretrain: bool = False) -> dict:
    """Return a config as a dict, without unset fields (None) and without sections in which no field is set."""
    content = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            value = _set_fields(value, is_pretrain=key == "pretrain")
            if not value and not is_pretrain and key != "pretrain":
                continue
        if value is not None:
            content[key] = value
    return content


def _flatten(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lists_to_tuples(value):
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    print(table())
