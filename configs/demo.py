"""The whole way in minutes on two CPU cores: a synthetic cohort, small encoders, MedFuse beside the LSTM.

Command: python -m medfuse_jax.main --config=configs/demo.py
"""

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.name = "demo"
    config.task = "pheno"
    config.method = "medfuse"
    config.data.synthetic_stays = 1500
    config.data.synthetic_film_fraction = 0.5  # more than MIMIC's 0.19: what fusion gains shows on few stays
    config.data.max_buckets = 1
    config.film.resize_px = 64
    config.film.crop_px = 56
    config.model.ehr_hidden = 64
    config.model.fusion_hidden = 128
    config.model.resnet_stage_sizes = (1, 1, 1, 1)
    config.model.resnet_width = 16
    config.batch_size = 16
    config.num_epochs = 8
    config.learning_rate = 2e-3

    config.pretrain.ehr = ConfigDict({"method": "uni_ehr", "learning_rate": 4e-3})
    config.pretrain.ehr.num_epochs = 6
    config.pretrain.cxr = ConfigDict({"task": "radiology", "method": "uni_cxr", "learning_rate": 2e-3})
    config.pretrain.cxr.num_epochs = 6
    return config
