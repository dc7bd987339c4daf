"""A planted change: a phenotype that both X-rays of a stay show together, and neither alone."""

import numpy as np
import polars as pl
import pytest
from refusals import refused

from data_prep.synthetic import cohort, cxr, signal, tree
from medfuse_jax import schema

_LABEL = [p.ccs for p in schema.PHENOTYPES].index(signal.CHANGED)


@pytest.fixture(scope="module")
def planted():
    """Return the stays, what is planted in them, and the effusion of the first and the last X-ray of each kept stay."""
    stays, planted = cohort.draw_stays(np.random.default_rng(0), 400)
    grew_N = signal.plant_change(np.random.default_rng(1), planted)
    planned = cxr.plan(np.random.default_rng(2), stays, planted["cxr"], 1.0, 0, grew_N)
    shown = planned.filter(pl.col("view") == "AP", pl.col("row") >= 0, pl.col("hours") >= 0)
    los_h = stays["los_h"].gather(shown["row"])
    kept = (stays["kind"] == "kept").gather(shown["row"])
    by_stay = shown.filter((shown["hours"] <= los_h) & kept).sort("row", "hours").group_by("row", maintain_order=True)
    effusion = pl.col("image_effusion")
    return planted, by_stay.agg(num=pl.len(), first=effusion.first(), last=effusion.last())


def test_every_stay_has_two_x_rays_and_its_label_is_their_change(planted):
    labels, by_stay = planted[0]["pheno_label"][:, _LABEL], planted[1]
    assert len(by_stay) == 400 and by_stay["num"].min() == 2
    change_N, label_N = (by_stay["last"] - by_stay["first"]).to_numpy(), labels[by_stay["row"].to_numpy()]
    assert signal.expected_auroc(label_N.astype(float), change_N) > 0.99


def test_the_last_x_ray_and_the_vitals_show_nothing(planted):
    labels, by_stay = planted[0]["pheno_label"][:, _LABEL], planted[1]
    label_N = labels[by_stay["row"].to_numpy()].astype(float)
    assert 0.42 < signal.expected_auroc(label_N, by_stay["last"].to_numpy()) < 0.58
    for latent_N in planted[0]["vitals"][by_stay["row"].to_numpy()].T:
        assert 0.4 < signal.expected_auroc(label_N, latent_N) < 0.6
    probabilities = planted[0]["pheno"]
    assert (probabilities["ehr_only"][:, _LABEL] == 0.5).all() and (probabilities["both"][:, _LABEL] == labels).all()


def test_a_cohort_with_a_change_is_not_taken_for_one_without(tmp_path):
    settings = {"num_stays": 10, "cxr_fraction": 0.1, "images_per_stay": 0.0, "workers": 1}
    report = tree.write(tmp_path / "cohort", **settings, change=True)
    assert report["change"] and tree.write(tmp_path / "cohort", **settings, change=True) == report
    with refused(field="--out"):
        tree.write(tmp_path / "cohort", **settings)
