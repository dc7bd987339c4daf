"""The X-ray encoder alone, on the 14 CheXpert labels: the pre-training in section 4.2 of Hayat et al. 2022.

Command: python -m medfuse_jax.main --config=configs/radiology.py --config.data.dir=DIR
Paper: no result for this stage. Other runs can start from its encoder: --config.init.cxr=WORKDIR.
Hardware and time: for a GPU or TPU; not yet run at full size. On 2 CPU cores an epoch of MIMIC-CXR's 325,188 training
X-rays should take about 14 hours (at the 6.5 X-rays/s of results/2026-11-27_cpu).
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
