"""The methods by name, one row each. To add one, write models/<file>.py and add a row (see CONTRIBUTING.md).

Importing this module imports no model, jax or flax: a row's class is imported when it is first used.
"""

import dataclasses
import importlib
import inspect
import numbers
from typing import Any

from medfuse_jax.runtime.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Method:
    """One method.

    title: its name in reports. model: 'file:Class' in medfuse_jax/models. fields: values of the class's fields that
    define the method. released: the layout of its released checkpoints, in torch_import/names.py; '' if none were
    released.
    has_peer: whether the benchmark has a PyTorch counterpart.
    features_only: whether its fusion reads only the encoders' features, so that a sweep can compute them once for all
    trials on frozen encoders.
    """

    title: str
    model: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    released: str = ""
    has_peer: bool = False
    features_only: bool = False

    @property
    def model_class(self) -> Any:
        """The row's subclass of models.model.Model."""
        module, _, name = self.model.partition(":")
        return getattr(importlib.import_module(f"medfuse_jax.models.{module}"), name)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The encoders that the model has, of 'ehr' and 'cxr'."""
        reads = {"ehr": self.model_class.uses_ehr, "cxr": self.model_class.uses_cxr}
        return tuple(name for name, used in reads.items() if used)

    def has_field(self, name: str) -> bool:
        """Return whether the model has a field, such as 'missing' or 'modalities', which not all models have."""
        return hasattr(self.model_class, name)


METHODS = {
    "uni_ehr": Method("EHR only (LSTM)", "unimodal:UniEhr", released="ehr", has_peer=True),
    "uni_cxr": Method("X-ray only (ResNet)", "unimodal:UniCxr", released="cxr", has_peer=True),
    "early": Method(
        "Early fusion",
        "concat:Concat",
        {"frozen_encoders": True},
        released="concat",
        has_peer=True,
        features_only=True,
    ),
    "joint": Method("Joint fusion", "concat:Concat", released="concat", has_peer=True, features_only=True),
    # The same model as joint; only the stays that they are trained on differ.
    "joint_zeros": Method("Joint fusion, zeros", "concat:Concat", released="concat", has_peer=True, features_only=True),
    "joint_learnable": Method(
        "Joint fusion, learnt vector",
        "concat:Concat",
        {"missing": "learnt"},
        released="concat",
        has_peer=True,
        features_only=True,
    ),
    "medfuse": Method("MedFuse", "medfuse:MedFuse", released="medfuse", has_peer=True, features_only=True),
    "medfuse_attention": Method("MedFuse, attention", "attention:MedFuseAttention"),
    "unified": Method("Unified", "unified:Unified", released="unified"),
    "mmtm3": Method("MMTM, layer 3", "mmtm:MmtmModel", {"stage": 3}, released="mmtm", has_peer=True),
    "mmtm4": Method("MMTM, layer 4", "mmtm:MmtmModel", {"stage": 4}, released="mmtm", has_peer=True),
    "daft3": Method("DAFT, layer 3", "daft:DaftModel", {"stage": 3}, released="daft", has_peer=True),
    "daft4": Method("DAFT, layer 4", "daft:DaftModel", {"stage": 4}, released="daft", has_peer=True),
    "metra": Method("MeTra", "metra:MeTra"),
    "drfuse": Method("DrFuse", "drfuse:DrFuse", features_only=True),
    "shaspec": Method("ShaSpec", "shaspec:ShaSpec", features_only=True),
    "healnet": Method("HEALNet", "healnet:HealNet"),
    "m3care": Method("M3Care", "m3care:M3Care"),
}


def with_field(name: str) -> list[str]:
    """Return the methods whose model has a field."""
    return [method for method, row in METHODS.items() if row.has_field(name)]


def build(method: str, num_labels: int, **options) -> Any:
    """Build a method's model, a models.model.Model. options: its other fields; raise UserError for an unknown one."""
    check_choice("method", method, METHODS)
    row = METHODS[method]
    allowed = [name for name in inspect.signature(row.model_class).parameters if name not in ("parent", "name")]
    for option in options:
        check_choice(f"option of method {method}", option, allowed)
    if not isinstance(num_labels, numbers.Integral) or num_labels < 1:
        raise UserError(f"num_labels is {num_labels!r}; give a whole number of at least 1", field="num_labels")
    return row.model_class(num_labels=num_labels, **{**row.fields, **options})
