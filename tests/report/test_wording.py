"""How reports name methods and write numbers."""

import numpy as np
import pytest

from medfuse_jax.report import wording


def test_a_title_names_further_modalities():
    assert wording.title({"method": "medfuse", "modalities": ["static", "mine/notes.py"]}) == "MedFuse + static + notes"


@pytest.mark.parametrize(
    ("result", "title"),
    [
        ({"method": "uni_ehr", "ehr_encoder": "transformer"}, "EHR only (transformer)"),
        ({"method": "uni_cxr", "cxr_encoder": "resnet50"}, "X-ray only (ResNet-50)"),
        (
            {"method": "medfuse", "ehr_encoder": "transformer", "cxr_encoder": "resnet50"},
            "MedFuse, transformer, ResNet-50",
        ),
        ({"method": "medfuse", "ehr_encoder": "lstm"}, "MedFuse"),
    ],
)
def test_a_title_names_unusual_encoders(result, title):
    assert wording.title(result) == title


def test_the_stage_that_a_run_is_compared_with_has_the_runs_encoder():
    result = {"method": "medfuse", "ehr_encoder": "transformer", "cxr_encoder": "resnet50"}
    names = [wording.against(result, {"against": method}) for method in ("uni_ehr", "uni_cxr", "joint")]
    assert names == ["EHR only (transformer)", "X-ray only (ResNet-50)", "Joint fusion"]
    assert wording.against({"method": "medfuse"}, {"against": "uni_ehr"}) == "EHR only (LSTM)"


def test_numbers_have_a_true_minus_sign_and_a_dash_if_missing():
    assert wording.number(0.12345) == "0.123" and wording.number(np.float32(0.5), 1) == "0.5"
    assert wording.number(-0.01, sign=True) == "−0.010" and wording.number(0.01, sign=True) == "+0.010"
    assert wording.number(-0.0001) == "0.000" and wording.number(-0.0001, sign=True) == "+0.000"
    assert wording.number(11914, 0) == "11,914"
    assert [wording.number(x) for x in (None, float("nan"), "x")] == ["–"] * 3
