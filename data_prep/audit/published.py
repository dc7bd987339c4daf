"""What the paper and its authors published about their data, for comparison with a build's numbers.

Hayat et al. 2022 (MedFuse): Table 4 (shares of positives), Figure 1 and section 4.1.2 (counts), Table 5 (deaths
among the paired test stays). The later counts are from the authors' repository after their fix of 2023-03.
All are for MIMIC-IV 1.0 and MIMIC-CXR 2.0.0.
"""

from medfuse_jax import schema

# Table 4: share of positives, in the order of schema.PHENOTYPES.
# fmt: off
_TRAIN = (
    0.269, 0.056, 0.074, 0.326, 0.206, 0.143, 0.189, 0.100, 0.255, 0.311, 0.114, 0.172, 0.404,
    0.418, 0.371, 0.070, 0.215, 0.125, 0.095, 0.048, 0.067, 0.127, 0.160, 0.158, 0.123,
)
_PAIRED_TEST = (
    0.321, 0.078, 0.093, 0.379, 0.240, 0.148, 0.226, 0.115, 0.295, 0.337, 0.120, 0.211, 0.406,
    0.433, 0.454, 0.071, 0.222, 0.169, 0.126, 0.054, 0.095, 0.185, 0.282, 0.227, 0.174,
)
# fmt: on
# Task -> label -> (all training stays, paired test stays); None if not published.
PREVALENCE: dict = {
    "pheno": {p.name: shares for p, *shares in zip(schema.PHENOTYPES, _TRAIN, _PAIRED_TEST, strict=True)},
    "mortality": {"In-hospital mortality": (None, round(209 / 1373, 3))},  # Table 5: 11 + 44 + 98 + 56 of 1,373
}
# Task -> what -> train, val, test; None if not published.
COUNTS: dict = {
    "pheno": {"records, paper": (42628, None, None), "paired, paper": (8056, None, None)},
    "mortality": {"paired, paper": (4885, 540, 1373), "paired, after the fix of 2023-03": (4485, 488, 1242)},
    "radiology": {"records, paper": (325188, 15282, 36625)},
}
# Task -> share of the test stays that are paired (paper, section 4).
PAIRED_TEST_SHARE = {"pheno": 0.188, "mortality": 0.262}
