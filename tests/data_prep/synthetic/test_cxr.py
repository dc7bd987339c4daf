"""Findings of synthetic X-rays follow their latents."""

import numpy as np
import polars as pl
from sklearn.metrics import roc_auc_score

from data_prep.synthetic import cohort, cxr


def test_findings_follow_the_latents():
    rng = np.random.default_rng(0)
    stays, truth = cohort.draw_stays(rng, 1000)
    planned = cxr.plan(rng, stays, truth["cxr"], 0.2, 1500)
    labels = cxr.tables(rng, planned)["mimic-cxr-2.0.0-chexpert"]
    latents = planned.unique("study_id").join(labels, on="study_id", how="inner")
    for finding, (_, weights) in cxr.FINDINGS.items():
        score = sum((w * latents[f"image_{name}"] for name, w in weights.items()), pl.Series([0.0] * len(latents)))
        auroc = roc_auc_score(latents[finding].fill_null(0) == 1, score)
        assert auroc > 0.9 if weights else auroc == 0.5, finding
    positive = (labels.select(*cxr.FINDINGS).drop("Support Devices").fill_null(0) == 1).sum_horizontal()
    assert ((positive == 0) >= (labels["No Finding"] == 1).fill_null(False)).all()
