"""The cohort that a run without data builds for itself."""

import pytest

from data_prep.synthetic import tree
from medfuse_jax.data import synthetic
from medfuse_jax.runtime.errors import UserError


def test_an_error_of_the_build_names_what_the_user_can_set(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    raw = tmp_path / "medfuse_jax" / f"synthetic_{tree.VERSION}_60_0.2" / "raw"
    raw.mkdir(parents=True)
    (raw / "other").touch()
    with pytest.raises(UserError, match=r"give another --out \(.*XDG_CACHE_HOME") as caught:
        synthetic.build(60, 0.2, ["pheno"])
    assert caught.value.path == raw
