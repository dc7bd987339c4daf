"""The X-ray encoder alone, on the 14 CheXpert labels: the pre-training of Hayat et al. 2022, 4.2.

Command: python -m medfuse_jax.main --config=configs/radiology.py --config.data.dir=DIR
Paper: gives no result for this stage. Its run can be the start of others: --config.init.cxr=WORKDIR.
Hardware and time: made for a GPU or TPU, where it has not been run at full size yet. On 2 CPU cores an epoch of
MIMIC-CXR's 325,188 training X-rays would take some 14 hours (predicted from the 6.5 X-rays/s of BENCHMARKS.md).
"""

from ml_collections import ConfigDict

from medfuse_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.name = "radiology"
    config.task = "radiology"
    config.method = "uni_cxr"
    config.learning_rate = 1e-4
    return config
