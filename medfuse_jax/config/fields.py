"""The fields of a config, each one row of `FIELDS`, where all other code looks them up; and the configs made of them.

To add a field, add a row (see CONTRIBUTING.md): it can then be set by flag, is validated, saved, compared on resume and
listed in docs/config.md.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator

try:
    from ml_collections import ConfigDict, config_dict
except ModuleNotFoundError:  # the benchmark reads the defaults on machines with only jax, flax and optax

    class ConfigDict(dict):  # type: ignore[no-redef]
        """As much of ml_collections' as it takes to build a run's step."""

        __getattr__ = dict.__getitem__
        __setattr__ = dict.__setitem__  # type: ignore[assignment]
        to_dict = dict.copy

    config_dict = None

from medfuse_jax import schema
from medfuse_jax.models import registry

PRETRAIN_STAGES = ("ehr", "cxr")
CXR_ENCODERS = ("resnet34", "resnet50", "features")
MOVABLE = ("data.dir", "data.cxr_features")  # places of data, whose content is compared instead
INFINITY = float("inf")


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
    low: float = -INFINITY
    high: float = INFINITY
    execution_only: bool = False
    searchable: bool = True
    affects_features: bool = True
    fusion_only: bool = False


_shared = functools.partial(Field, searchable=False)
_fusion = functools.partial(Field, fusion_only=True)
_training = functools.partial(Field, affects_features=False)  # how the fusion is trained
_loss = functools.partial(_fusion, affects_features=False, low=0, high=1e6)
_execution = functools.partial(Field, execution_only=True, searchable=False)

# Defaults are the paper's values (Hayat et al. 2022, 4.4 and A.1), except where the help says otherwise.
FIELDS = {
    "name": _shared("experiment", "name of the run in reports"),
    "task": _shared("pheno", "what is predicted", choices=tuple(schema.TASKS)),
    "method": _training("medfuse", "the model", choices=tuple(registry.METHODS)),
    "seed": _training(0, "of initial weights, dropout, augmentation and data order", low=0, high=2**32 - 1),
    "data.dir": _shared("", "folder of the shards; '': a synthetic cohort, built once and cached"),
    "data.synthetic_stays": _shared(1000, "stays of the synthetic cohort", low=50, high=10**6),
    "data.synthetic_cxr_fraction": _shared(0.19, "its fraction of stays with an X-ray; MIMIC's", low=0.05, high=1.0),
    "data.train_stays": _fusion(
        "partial", "training stays: 'partial': all; 'paired': those with EHR and X-ray", choices=("partial", "paired")
    ),
    "data.val_stays": _fusion(
        "partial", "validation stays that select the model", choices=("partial", "paired"), searchable=False
    ),
    "data.images": _fusion(
        "last", "X-rays of a stay that are read: the 'last', or 'all' with their times", choices=("last", "all")
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
    "data.folds": _shared(0, "divide patients anew into so many folds; 0: the shards' own splits", low=0, high=1000),
    "data.fold": _shared(0, "which of the folds is tested, from 0", low=0, high=999),
    "data.statistics": Field("train", "EHR mean and std: 'train' split's, or a JSON file with 'mean' and 'std'"),
    "data.cxr_features": Field(
        "", "precomputed features of X-rays by dicom_id (.npz, .parquet, .csv); see docs/encoders.md"
    ),
    "data.max_buckets": Field(4, "padded lengths; each costs a compilation", low=1, high=32),
    "data.order_seed": _shared(-1, "of the data order alone; -1: seed", low=-1),
    "data.readers": _execution(0, "threads that read shards; 0: one a core, at most 8", low=0, high=256),
    "image.resize_px": Field(256, "side after resizing", low=32, high=1024),
    "image.crop_px": Field(224, "side of the network's input, at most resize_px", low=32, high=1024),
    "image.crop": Field(
        "center", "in training: 'center' as released, 'random' as the paper says", choices=("center", "random")
    ),
    "image.flip": Field(True, "flip horizontally with probability 0.5 in training"),
    "image.rotation_deg": Field(45.0, "largest rotation either way in training", low=0, high=180),
    "image.scale": Field((0.85, 1.15), "smallest and largest scale in training, between 0.1 and 10"),
    "image.translation": Field(0.15, "largest translation in training, as a fraction of the side", low=0, high=1),
    "model.ehr_encoder": Field(
        "lstm", "encoder of series: two LSTM layers, or two of a causal transformer", choices=("lstm", "transformer")
    ),
    "model.ehr_hidden": Field(256, "units of each layer of the EHR encoder", low=1, high=2**13),
    "model.fusion_hidden": _training(512, "units of the fusion LSTM", low=1, high=2**13),
    "model.dropout": _training(0.3, "dropout rate of the EHR features", low=0, high=0.99),
    "model.cxr_encoder": Field(
        "resnet34",
        "encoder of X-rays: a ResNet of this kind; 'features': no encoder; read them from data.cxr_features",
        choices=CXR_ENCODERS,
    ),
    "model.resnet_stage_sizes": Field(
        (3, 4, 6, 3), "blocks of each ResNet stage, here ResNet-34's and ResNet-50's; not read with 'features'"
    ),
    "model.resnet_width": Field(
        64,
        "channels of the first ResNet stage; ResNet-50 outputs four times as many; not read with 'features'",
        low=1,
        high=2**10,
    ),
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
    "loss.ehr_only": _loss(1.0, "weight of the EHR classifier's loss (mmtm, unified, drfuse)"),
    "loss.cxr_only": _loss(1.0, "weight of the X-ray classifier's loss (mmtm, unified, drfuse)"),
    "loss.shared_only": _loss(1.0, "weight of the loss of the shared features' classifier (drfuse)"),
    "loss.align": _loss(0.0, "weight of the alignment loss (mmtm); 0 as released"),
    "loss.divergence": _loss(1.0, "weight of the shared features' divergence (drfuse)"),
    "loss.orthogonal": _loss(1.0, "weight of shared and distinct features' cosine (drfuse)"),
    "loss.ranking": _loss(1.0, "weight of the attention's ranking loss (drfuse)"),
    "loss.distance": _loss(0.1, "weight of the shared features' distance (shaspec); our choice"),
    "loss.domain": _loss(0.02, "weight of the modality classifier's loss (shaspec); our choice"),
    "loss.weighting": _training(
        "hour", "what the loss is a mean over in hourly tasks: every 'hour', or every 'stay'", choices=("hour", "stay")
    ),
    "batch_size": _training(16, "rows of a training batch, over all devices", low=1, high=2**16),
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
        "auto",
        "the LSTM's kernel; 'auto': pallas on GPUs that run it, else chunks",
        choices=("auto", "chunks", "pallas", "cudnn"),
    ),
    "parallel": _execution(
        "pmap", "how a step is divided over devices; several processes use shard_map", choices=("pmap", "shard_map")
    ),
    "placement": _execution(
        "auto",
        "train and val splits: in the devices' memory, streamed, or 'auto': the former where they fit in half of it",
        choices=("auto", "device", "stream"),
    ),
    "profile_steps": _execution("", "'a:b': trace steps a to b (from 1) into <workdir>/profile", fusion_only=True),
    "eval.batch_size": _shared(64, "rows of an evaluation batch", low=1, high=2**16),
    "eval.num_bootstrap": _shared(1000, "resamples of the confidence intervals", low=1, high=10**6),
    "eval.modalities_alone": _execution(
        False, "after each epoch, also score the validation stays with one modality alone", fusion_only=True
    ),
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


def names(**properties: bool) -> frozenset[str]:
    """Return the fields whose row has these properties, as in names(searchable=True)."""
    return frozenset(n for n, f in FIELDS.items() if all(getattr(f, p) == v for p, v in properties.items()))


def stage_fields() -> list[str]:
    return [name for name in FIELDS if name not in _NOT_OF_A_STAGE]


def is_execution_only(name: str) -> bool:
    """Return whether a field, of the run or of one of its stages, changes results by rounding at most."""
    return name.removeprefix("pretrain.ehr.").removeprefix("pretrain.cxr.") in names(execution_only=True)


def default() -> ConfigDict:
    """Return a config with every field at its default, and no pre-training."""
    config = _nested({name: field.default for name, field in FIELDS.items()})
    config.pretrain = ConfigDict()
    return config


def pretraining(**fields) -> ConfigDict:
    """Return a section for config.pretrain.ehr or .cxr: what differs from the fusion run; all else is inherited.

    Every field can be set by flag, as in --config.pretrain.ehr.data.train_stays=paired.
    """
    section = _nested({name: config_dict.placeholder(type(FIELDS[name].default)) for name in stage_fields()})
    section.update(fields)
    return section


def section(name: str, **changes) -> dict:
    """Return the default fields of a section such as 'image', with changes."""
    prefix = f"{name}."
    fields = {n.removeprefix(prefix): field.default for n, field in FIELDS.items() if n.startswith(prefix)}
    assert not changes.keys() - fields.keys(), f"no such field of {name}: {sorted(changes.keys() - fields.keys())}"
    return fields | changes


def reads_features(config: ConfigDict) -> bool:
    """Return whether a run reads precomputed features of X-rays instead of their pixels."""
    return config.model.cxr_encoder == "features" and registry.METHODS[config.method].model_class.uses_cxr


def stages(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return the pre-training stages by the encoder they train ('ehr', 'cxr'), except any equal to the run itself.

    Precomputed features come from an encoder that is trained already.
    """
    if config.encoders != "pretrained":
        return {}
    trained = [name for name in config.pretrain if name != "cxr" or config.model.cxr_encoder != "features"]
    staged = {name: stage(config, name) for name in trained}
    return {name: s for name, s in staged.items() if (s.method, s.task) != (config.method, config.task)}


def stage(config: ConfigDict, name: str) -> ConfigDict:
    """Return the whole config of a stage: its section, the defaults of fusion_only fields, the run's other fields."""
    derived = config.copy_and_resolve_references()
    derived.pretrain = ConfigDict()
    derived.update_from_flattened_dict({n: FIELDS[n].default for n in names(fusion_only=True)})
    given = dict(flatten(set_fields(config.pretrain[name])))
    derived.update_from_flattened_dict(given)
    if not schema.TASKS[derived.task].hourly and "loss.weighting" not in given:
        derived.loss.weighting = FIELDS["loss.weighting"].default  # of an hourly fusion run
    derived.name = f"{config.name}_pretrain_{name}"
    return derived


def flat(config: ConfigDict) -> dict:
    """Return every field that is set, by its dotted name, with values as JSON has them."""
    return dict(flatten(json.loads(json.dumps(set_fields(config.copy_and_resolve_references())))))


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
    low, high = (f"{limit:.10g}" for limit in (field.low, field.high))
    if field.low > -INFINITY and field.high < INFINITY:
        return f"{low} to {high}"
    return f"at least {low}" if field.low > -INFINITY else ""


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


def set_fields(config: ConfigDict, is_pretrain: bool = False) -> dict:
    """Return a config as a dict, without unset fields (None) and without sections in which no field is set."""
    content = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            value = set_fields(value, is_pretrain=key == "pretrain")
            if not value and not is_pretrain and key != "pretrain":
                continue
        if value is not None:
            content[key] = value
    return content


def flatten(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
