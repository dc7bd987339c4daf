"""The recurrence's case: every kernel that is timed computes the same gradients."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from medfuse_jax.bench import cases, lstm
from medfuse_jax.models import ehr_encoder
from medfuse_jax.models.recurrence import pallas

_CASE = next(case for case in cases.preset("tiny")[0] if case.kind == "lstm")
_TINY = dataclasses.replace(_CASE, repeats=1, num_batches=1, peers=())


def test_on_a_gpu_all_kernels_are_timed_except_one_that_fails_or_is_wrong(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel\nand more words")

    def wrong(*args):
        hidden_BTD, last_BD = ehr_encoder.LSTM_KERNELS["chunks"](*args)
        return 1.1 * hidden_BTD, last_BD

    right = functools.partial(pallas.pallas_lstm, interpret=True)
    kernels = {**ehr_encoder.LSTM_KERNELS, "pallas": right, "cudnn": fails, "wrong": wrong}
    monkeypatch.setattr(ehr_encoder, "LSTM_KERNELS", kernels)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shown = []
    rows = lstm.measure(_TINY, say=lambda text, end="\r": shown.append(text))
    assert [row["contender"] for row in rows] == ["ours", "plain_scan", "pallas"]
    assert all(row["difference_from_plain_scan"] < 1e-5 for row in rows)
    assert "cudnn: left out: RuntimeError: no such kernel" in shown
    assert any(re.match(r"wrong: left out: .* differ from the plain scan's by 0\.\d+", text) for text in shown)


def test_wrong_default_kernel_is_an_error(monkeypatch):
    monkeypatch.setattr(lstm, "_MAX_DIFFERENCE", {"float32": 0.0})
    with pytest.raises(AssertionError, match="ours: its gradients differ"):
        lstm.measure(_TINY)


def test_difference_is_relative_to_the_largest_element_of_an_array():
    gradients = ({"bias": np.array([1.0, -2.0])}, {"kernel": np.array([4.0, 4.0])})
    other = ({"bias": np.array([1.0, -2.0])}, {"kernel": np.array([4.0, 3.0])})
    assert lstm._difference(other, gradients) == 0.25
