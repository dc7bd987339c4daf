"""MedFuse (PT) on in-hospital mortality: Table 2, row "MedFuse (PT)" of Hayat et al. 2022.

Command: python -m medfuse_jax.main --config=configs/mortality.py --config.data.dir=DIR
Paper: AUROC 0.841 (0.813, 0.868), AUPRC 0.544 (0.477, 0.609) on the paired test stays.
Hardware and time: for a GPU or TPU; not yet run at full size (see configs/pheno.py).
Learning rates: Table A1, except 1e-4 for pre-training the X-ray encoder, which the paper does not give.
"""

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.name = "mortality"
    config.task = "mortality"
    config.method = "medfuse"
    config.learning_rate = 1.452e-5

    config.pretrain.ehr = config_lib.pretraining(method="uni_ehr", learning_rate=5.399e-4)
    config.pretrain.cxr = config_lib.pretraining(task="radiology", method="uni_cxr", learning_rate=1e-4)
    return config
