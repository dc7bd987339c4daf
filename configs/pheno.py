"""MedFuse (PT) on phenotyping: Table 2, row "MedFuse (PT)" of Hayat et al. 2022.

Command: python -m medfuse_jax.main --config=configs/pheno.py --config.data.dir=DIR
Paper: AUROC 0.756 (0.729, 0.782), AUPRC 0.466 (0.420, 0.515) on the paired test stays.
Hardware and time: for a GPU or TPU; not yet run at full size. On 2 CPU cores an epoch of the paper's 42,628 training
stays should take about 22 minutes (at the 32.6 stays/s of results/2026-11-27_cpu).
Learning rates: Table A1, except 1e-4 for pre-training the X-ray encoder, which the paper does not give.
"""

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.name = "pheno"
    config.task = "pheno"
    config.method = "medfuse"
    config.learning_rate = 7.347e-5

    config.pretrain.ehr = config_lib.pretraining(method="uni_ehr", learning_rate=5.399e-4)
    config.pretrain.cxr = config_lib.pretraining(task="radiology", method="uni_cxr", learning_rate=1e-4)
    return config
