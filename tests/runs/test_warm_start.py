"""warm_start: a run begins with the weights of its sources."""

import jax
import numpy as np
import pytest

from medfuse_jax import run as run_lib
from medfuse_jax import train
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints, sources, warm_start
from medfuse_jax.runs import workdir as workdir_lib


def test_encoders_start_from_their_pretraining(tiny_config, tmp_path):
    pretrained = tiny_config.copy_and_resolve_references()
    pretrained.method, pretrained.num_epochs, pretrained.seed = "uni_ehr", 1, 7
    source = run_lib.open_run(pretrained)
    workdir_lib.claim(tmp_path / "ehr", source)
    train.train(source, tmp_path / "ehr")
    best = checkpoints.restore_best(tmp_path / "ehr", source.abstract_state())
    fresh = run_lib.open_run(tiny_config).fresh_state()
    started = warm_start.begin(fresh, {"ehr": (tmp_path / "ehr", source)})
    jax.tree.map(np.testing.assert_array_equal, started.params["ehr_encoder"], best.params["ehr_encoder"])
    jax.tree.map(np.testing.assert_array_equal, started.params["cxr_encoder"], fresh.params["cxr_encoder"])
    kernel = lambda state: np.asarray(state.params["ehr_encoder"]["layer0"]["input_kernel"])  # noqa: E731
    assert np.abs(kernel(started) - kernel(fresh)).max() > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("uni_ehr", "medfuse", "daft3") else pytest.param(m, marks=pytest.mark.nightly)
        for m in registry.METHODS
    ],
)
def test_every_method_starts_from_the_part_of_an_encoder_that_it_has(tiny_config, tmp_path, monkeypatch, method):
    """Checked on shapes alone: instead of weights, each leaf holds the name of its source."""
    encoders = {}
    for name, changes in (("ehr", {"method": "uni_ehr"}), ("cxr", {"method": "uni_cxr", "task": "radiology"})):
        config = tiny_config.copy_and_resolve_references()
        config.update(changes)
        encoders[name] = (tmp_path / name, run_lib.open_run(config))
    trained = {
        folder: jax.tree.map(lambda x, name=name: np.full(x.shape, name), source.abstract_state())
        for name, (folder, source) in encoders.items()
    }
    monkeypatch.setattr(checkpoints, "restore_best", lambda workdir, state: trained[workdir])
    tiny_config.method = method
    run = run_lib.open_run(tiny_config)
    fresh = jax.tree.map(lambda x: np.full(x.shape, "new"), run.abstract_state())
    encoders = {name: encoder for name, encoder in encoders.items() if name in registry.METHODS[method].encoders}
    for name, (_, source) in encoders.items():
        sources.check(run, name, tmp_path / "source", source)
    started = warm_start.begin(fresh, encoders)
    assert jax.tree.map(np.shape, started) == jax.tree.map(np.shape, fresh)
    for module, values in started.params.items():
        expected = {"ehr_encoder": "ehr", "cxr_encoder": "cxr"}.get(module, "new")
        assert all((leaf == expected).all() for leaf in jax.tree.leaves(values)), module
    for module, values in started.batch_stats.items():  # M3Care's bank is its own
        expected = "new" if module == "bank" else "cxr"
        assert all((leaf == expected).all() for leaf in jax.tree.leaves(values)), module
    assert ("stage4_block0" in started.params.get("cxr_encoder", {})) == (method not in ("uni_ehr", "daft3"))
