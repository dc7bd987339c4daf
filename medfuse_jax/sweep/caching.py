"""Which trials share features that frozen encoders compute once, and the augmentation that this switches off."""

import json

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib
from medfuse_jax import records, schema
from medfuse_jax.models import registry
from medfuse_jax.runtime.errors import UserError

NO_AUGMENTATION = {
    "image.flip": False,
    "image.rotation_deg": 0.0,
    "image.scale": (1.0, 1.0),
    "image.translation": 0.0,
    "image.crop": "center",
}


def can_cache(config: ConfigDict, encoders: dict) -> bool:
    """Return whether a config's features can be computed once for all trials.

    This takes two frozen encoders, a method that reads only their features, an even crop margin, one score and at most
    one X-ray a stay.
    """
    if schema.TASKS[config.task].hourly or config.data.images == records.ALL_IMAGES:
        return False
    method = registry.METHODS[config.method]
    is_frozen = method.fields.get("frozen_encoders") or config.model.freeze_encoders
    # With an odd margin, the centre crop in training is half a pixel off the one in evaluation.
    is_even = (config.image.resize_px - config.image.crop_px) % 2 == 0
    return bool(method.features_only and is_frozen and is_even) and set(encoders) == {"ehr", "cxr"}


def check_values(values: dict, config: ConfigDict, encoders: dict) -> None:
    """Raise UserError if a trial varies what is done to images that are encoded once, or that it does not read."""
    of_images = sorted(name for name in values if name.startswith("image."))
    uses_cxr = registry.METHODS[config.method].model_class.uses_cxr or "method" in values  # another trial's may
    if of_images and (not uses_cxr or config.model.cxr_encoder == "features"):
        message = f"{of_images[0]} has no effect: the trial reads no image; do not vary it"
        raise UserError(message, field=of_images[0], value=values[of_images[0]])
    varied = sorted(values.keys() & NO_AUGMENTATION.keys())
    if varied and can_cache(config, encoders):
        message = (
            f"{varied[0]} has no effect: frozen encoders see each X-ray once, without augmentation; do not vary it"
        )
        raise UserError(message, field=varied[0], value=values[varied[0]])


def features_key(config: ConfigDict) -> str:
    """Return a key for the features, made of all config fields that may change them."""
    without_effect = config_lib.names(affects_features=False)
    return json.dumps({k: v for k, v in config_lib.flat(config).items() if k not in without_effect}, sort_keys=True)
