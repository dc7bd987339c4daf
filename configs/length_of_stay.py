"""MedFuse on the remaining length of stay, in ten bins, at every hour of a stay (docs/hourly.md).

Command: python -m medfuse_jax.main --config=configs/length_of_stay.py --config.data.dir=hourly
    --workdir=runs/length_of_stay
Hardware and time: for a GPU or TPU; not yet run at full size. No published result on MIMIC-IV with X-rays is known.
Learning rates: those of configs/pheno.py for pre-training; the fusion's is the default.
"""

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.name = "length_of_stay"
    config.task = "length_of_stay"
    config.method = "medfuse"

    config.pretrain.ehr = config_lib.pretraining(method="uni_ehr", learning_rate=5.399e-4)
    config.pretrain.cxr = config_lib.pretraining(task="radiology", method="uni_cxr", learning_rate=1e-4)
    return config
