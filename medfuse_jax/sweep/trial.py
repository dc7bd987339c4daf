"""One trial of a sweep."""

import dataclasses
import operator

from ml_collections import ConfigDict

from medfuse_jax.runtime.errors import UserError

# Short names; other parameters go by the name of their config field.
ALIASES = {"lr": "learning_rate", "dropout": "model.dropout", "ehr_only_ratio": "data.ehr_only_ratio"}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: its number, and the fields in which its config differs from the sweep's."""

    number: int
    values: dict

    def config(self, base: ConfigDict) -> ConfigDict:
        """Return the sweep's config with the trial's values; raise UserError for a value of the wrong type."""
        config = base.copy_and_resolve_references()
        for field, value in self.values.items():
            try:
                config.update_from_flattened_dict({field: value})
            except TypeError:
                message = f"config.{field} is {value!r}; give a value like {operator.attrgetter(field)(base)!r}"
                raise UserError(message, field=f"config.{field}", value=value) from None
        return config

    @property
    def lease(self) -> str:
        return f"trial_{self.number:03d}"

    def describe(self) -> str:
        return ", ".join(f"{short_name(field)} {value}" for field, value in self.values.items())


def short_name(field: str) -> str:
    return {full: alias for alias, full in ALIASES.items()}.get(field, field)
