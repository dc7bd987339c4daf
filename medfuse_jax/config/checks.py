"""What a config must satisfy before a run starts: its fields, rules over several of them, and the devices."""

import difflib
from collections.abc import Iterable

from medfuse_jax import schema
from medfuse_jax.config.fields import (
    FIELDS,
    INFINITY,
    PRETRAIN_STAGES,
    ConfigDict,
    Field,
    flatten,
    set_fields,
    stage,
    stage_fields,
)
from medfuse_jax.models import registry
from medfuse_jax.runtime import files
from medfuse_jax.runtime.errors import UserError, check_choice

MAX_BLOCKS = 100  # of a ResNet stage


def validate(config: ConfigDict) -> None:
    """Raise UserError for the first field that is unknown, missing, of the wrong type or out of range."""
    content = set_fields(config)
    if "pretrain" not in content:
        raise UserError("config.pretrain is missing", field="config.pretrain")
    pretrain = content.pop("pretrain")
    _check_fields(content, FIELDS, "config")
    given = dict(flatten(content))
    if missing := [name for name in FIELDS if name not in given]:
        raise UserError(f"config.{missing[0]} is missing", field=f"config.{missing[0]}")
    files.check_local("config.data.dir", config.data.dir)
    parse_profile_steps(config)
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
    for name, value in flatten(content):
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
        raise _not_a_section(where, section, stage_fields())
    for field in ("encoders", "init", "pretrain"):
        if field in section:
            raise UserError(
                f"{where}.{field} is given, but a stage starts from random weights: train it as a run of its own and "
                f"give that run as config.init.{where.rpartition('.')[2]}",
                field=f"{where}.{field}",
            )
    _check_fields(section, stage_fields(), where)


def _not_a_section(where: str, value, fields: Iterable[str]) -> UserError:
    return UserError(f"{where} is {value!r}; it must hold the fields {', '.join(fields)}", field=where, value=value)


def _check_value(where: str, value, field: Field) -> None:
    wanted = type(field.default)
    is_number = wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(value) is not wanted and not is_number:
        what = f"{where} is {value!r}, a {type(value).__name__}; it must be a {wanted.__name__}"
        raise UserError(what, field=where, value=value)
    if field.choices:
        check_choice(where, value, field.choices)
    if wanted in (int, float):
        _check_range(where, value, field.low, field.high)


def _check_range(where: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limits = f"at least {low}" if high == INFINITY else f"between {low} and {high}"
        raise UserError(f"{where} is {value}; it must be {limits}", field=where, value=value)


def _check_sizes(config: ConfigDict) -> None:
    """Check ranges that depend on another field, and fields of several numbers."""
    _check_range("config.images_per_batch", config.images_per_batch, 0, config.batch_size)
    _check_range("config.image.crop_px", config.image.crop_px, 32, config.image.resize_px)
    if config.data.folds == 1 or config.data.fold >= max(config.data.folds, 1):
        what = (
            f"config.data.fold is {config.data.fold} and config.data.folds {config.data.folds}; give at least 2 folds"
        )
        raise UserError(f"{what}, numbered from 0", field="config.data.fold", value=config.data.fold)
    scale, sizes = config.image.scale, config.model.resnet_stage_sizes
    if len(scale) != 2 or {*map(type, scale)} - {int, float} or not 0.1 <= scale[0] <= scale[1] <= 10:
        what = f"config.image.scale is {scale}; give the smallest and the largest, between 0.1 and 10"
        raise UserError(what, field="config.image.scale", value=scale)
    if len(sizes) != 4 or {*map(type, sizes)} != {int} or not 1 <= min(sizes) <= max(sizes) <= MAX_BLOCKS:
        what = f"config.model.resnet_stage_sizes is {sizes}; give four whole numbers from 1 to {MAX_BLOCKS}"
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
    if model.ehr_encoder != "lstm":
        _check_needs_no_lstm(config)
    _check_features(config)
    if model.modalities:
        from medfuse_jax.data.modalities import loading  # late: imports flax

        loading.load(model.modalities)
    if schema.TASKS[config.task].hourly:
        _check_causal(config)
    elif config.loss.weighting != FIELDS["loss.weighting"].default:
        hourly = " or ".join(name for name, task in schema.TASKS.items() if task.hourly)
        raise UserError(
            f"config.loss.weighting is {config.loss.weighting!r}, which the task {config.task!r} does not read: leave "
            f"it out, or use {hourly}",
            field="config.loss.weighting",
            value=config.loss.weighting,
        )
    if config.data.images != FIELDS["data.images"].default:
        _check_all_images(config)
    for name, weight in config.loss.items():
        if (
            name != "weighting"
            and weight != FIELDS[f"loss.{name}"].default
            and name not in method.model_class.loss_weights()
        ):
            readers = [m for m, row in registry.METHODS.items() if name in row.model_class.loss_weights()]
            raise UserError(
                f"config.loss.{name} is {weight}, and the method {config.method!r} has no such loss: leave it out, or "
                f"use {' or '.join(readers)}",
                field=f"config.loss.{name}",
                value=weight,
            )


def _check_causal(config: ConfigDict) -> None:
    """Refuse a method that cannot score every hour of a stay in one pass."""
    if reason := registry.METHODS[config.method].model_class.not_causal:
        causal = [name for name, row in registry.METHODS.items() if not row.model_class.not_causal]
        raise UserError(
            f"config.task is {config.task!r}, which has a score at every hour, and the method {config.method!r} "
            f"{reason}: use {' or '.join(causal)}",
            field="config.method",
            value=config.method,
        )


def _check_needs_no_lstm(config: ConfigDict) -> None:
    """Refuse a method that acts within the LSTM."""
    if reason := registry.METHODS[config.method].model_class.needs_lstm:
        value = config.model.ehr_encoder
        what = f"config.model.ehr_encoder is {value!r}, and the method {config.method!r} {reason}: use 'lstm'"
        raise UserError(what, field="config.model.ehr_encoder", value=value, nearest="lstm")


def _check_features(config: ConfigDict) -> None:
    """Check what goes together with precomputed features of X-rays."""
    encoder, file = config.model.cxr_encoder, config.data.cxr_features
    files.check_local("config.data.cxr_features", file)
    if encoder != "features" and file:
        what = f"config.data.cxr_features is set, but config.model.cxr_encoder={encoder!r} does not read it"
        raise UserError(f"{what}: use 'features', or leave the file out", field="config.data.cxr_features", value=file)
    if encoder != "features":
        return
    if not file:
        what = "config.model.cxr_encoder is 'features', and config.data.cxr_features names no file: give one"
        raise UserError(f"{what} (docs/encoders.md)", field="config.data.cxr_features", value=file)
    if reason := registry.METHODS[config.method].model_class.needs_maps:
        what = f"config.model.cxr_encoder is 'features', and the method {config.method!r} {reason}"
        raise UserError(f"{what}: use 'resnet34' or 'resnet50'", field="config.model.cxr_encoder", value=encoder)
    for field, value, default in (
        ("init.cxr", config.init.cxr, FIELDS["init.cxr"].default),
        ("model.batch_norm", config.model.batch_norm, FIELDS["model.batch_norm"].default),
    ):
        if value != default:
            what = f"config.{field} is {value!r}, and with config.model.cxr_encoder='features' there is no X-ray "
            raise UserError(f"{what}encoder to apply it to; leave it out", field=f"config.{field}", value=value)


def _check_all_images(config: ConfigDict) -> None:
    """Refuse a method that reads at most one X-ray a stay."""
    model_class = registry.METHODS[config.method].model_class
    if not registry.METHODS[config.method].has_field("all_images"):
        reads = "one X-ray a stay" if model_class.uses_cxr else "no X-ray"
        what = f"the method {config.method!r} reads {reads}: use {' or '.join(registry.with_field('all_images'))}"
        where = "config.data.images"
        raise UserError(f"{where} is {config.data.images!r}, and {what}", field=where, value=config.data.images)


def _check_init(config: ConfigDict) -> None:
    if config.init.model and (others := [name for name in PRETRAIN_STAGES if config.init[name]]):
        raise UserError(
            f"config.init.model is {config.init.model!r}, a whole model, and config.init.{others[0]} is "
            f"{config.init[others[0]]!r}, a part of one: leave one of them out",
            field="config.init.model",
        )


def parse_profile_steps(config: ConfigDict) -> tuple[int, int]:
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
