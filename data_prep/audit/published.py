"""What the paper and its authors published of their data, to be shown beside a build's own numbers.

Hayat et al. 2022 (MedFuse): Table 4 (shares of positives), Figure 1 and section 4.1.2 (counts), Table 5 (deaths
among the paired test stays). The later counts are those of the authors' repository after their fix of 2023-03.
All are of MIMIC-IV 1.0 and MIMIC-CXR 2.0.0.
"""

from medfuse_jax import schema

# Share of positives, Table 4: (all training stays, paired test stays), in the order of tasks.PHENOTYPES.
_TABLE_4 = (
    (0.269, 0.321),
    (0.056, 0.078),
    (0.074, 0.093),
    (0.326, 0.379),
    (0.206, 0.240),
    (0.143, 0.148),
    (0.189, 0.226),
    (0.100, 0.115),
    (0.255, 0.295),
    (0.311, 0.337),
    (0.114, 0.120),
    (0.172, 0.211),
    (0.404, 0.406),
    (0.418, 0.433),
    (0.371, 0.454),
    (0.070, 0.071),
    (0.215, 0.222),
    (0.125, 0.169),
    (0.095, 0.126),
    (0.048, 0.054),
    (0.067, 0.095),
    (0.127, 0.185),
    (0.160, 0.282),
    (0.158, 0.227),
    (0.123, 0.174),
)
# Task -> label -> (all training stays, paired test stays); None where it was not published.
PREVALENCE = {
    "pheno": dict(zip((p.name for p in schema.PHENOTYPES), _TABLE_4, strict=True)),
    "mortality": {"In-hospital mortality": (None, round(209 / 1373, 3))},  # Table 5: 11 + 44 + 98 + 56 of 1,373
}
# Task -> what -> train, val, test; None where it was not published.
COUNTS = {
    "pheno": {"records, paper": (42628, None, None), "paired, paper": (8056, None, None)},
    "mortality": {"paired, paper": (4885, 540, 1373), "paired, after the fix of 2023-03": (4485, 488, 1242)},
    "radiology": {"records, paper": (325188, 15282, 36625)},
}
# Task -> share of the test stays that are paired (paper, section 4).
PAIRED_TEST_SHARE = {"pheno": 0.188, "mortality": 0.262}
