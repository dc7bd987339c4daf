"""How trials are kept: what a trial was begun with it goes on with, and a damaged file is named with what to do."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweep_cases import RATES, stop_at_save, sweep

from medfuse_jax import evaluate, step
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import results, trial_store


@pytest.mark.slow
def test_a_sweep_begun_as_one_process_goes_on_as_several(ehr_config, tmp_path, monkeypatch):
    """Several keep each trial in a file; stopped when one of two trials has saved its last epoch."""
    whole = sweep(ehr_config, tmp_path / "whole", RATES, num_trials=2, lanes=1)
    saved = stop_at_save(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        sweep(ehr_config, tmp_path / "stopped", RATES, num_trials=2, lanes=1)
    monkeypatch.setattr(trial_store, "new_keeper", trial_store.FileKeeper)
    save_file = trial_store.FileKeeper.save
    monkeypatch.setattr(trial_store.FileKeeper, "save", lambda *args: (saved.append(args[0]), save_file(*args)))
    assert sweep(ehr_config, tmp_path / "stopped", RATES, num_trials=2, lanes=1) == whole
    assert len(saved) == 4, "no epoch of the two trials is trained twice"
    chosen = results.trial_dir(tmp_path / "stopped", int(whole[0]["trial"]))
    assert json.loads((chosen / "result.json").read_text())["best_epoch"] == int(whole[0]["best_epoch"])


def test_any_trial_kept_in_a_file_can_be_exported_and_scored(ehr_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial_store, "new_keeper", trial_store.FileKeeper)
    ehr_config.num_epochs = 1
    rows = sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1)
    other = results.trial_dir(tmp_path, int(rows[1]["trial"]))
    with pytest.raises(UserError, match=rf"kept in state\.npz: .* with --export={int(other.name)}$"):
        evaluate.evaluate(other)
    with pytest.raises(UserError, match="--export=2: the trials are 0 to 1"):
        sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1, export=[2])
    capsys.readouterr()
    sweep(ehr_config, tmp_path, RATES, num_trials=2, lanes=1, export=[int(other.name)])
    assert "AUROC [95 % CI]" in capsys.readouterr().out  # the chosen trial's test result
    chosen = json.loads((results.trial_dir(tmp_path, int(rows[0]["trial"])) / "result.json").read_text())
    assert evaluate.evaluate(other)["loss"] != chosen["loss"]
    assert evaluate.evaluate(other, evaluate.Scored("val"))["subsets"]["all"]["auroc_macro"] == pytest.approx(
        float(rows[1]["val_auroc"]), abs=1e-6
    )


def test_the_test_score_is_of_the_file_and_not_of_checkpoints_before_it(ehr_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_store, "new_keeper", trial_store.FileKeeper)
    ehr_config.num_epochs = 1
    sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)
    folder = results.trial_dir(tmp_path, 0)
    stale = json.loads((folder / "result.json").read_text())
    with np.load(folder / "state.npz") as stored:
        entries = dict(stored)
    entries["best/params.classifier.bias"] += 1
    np.savez(folder / "state.npz", **entries)
    (folder / "result.json").unlink()
    sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)
    assert json.loads((folder / "result.json").read_text())["loss"] > stale["loss"] + 0.01


def test_a_damaged_file_says_what_to_delete_and_the_trial_starts_anew(ehr_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_store, "new_keeper", trial_store.FileKeeper)
    ehr_config.num_epochs = 1
    whole = sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)
    folder = results.trial_dir(tmp_path, 0)
    (folder / "result.json").unlink()
    (folder / "state.npz").write_bytes((folder / "state.npz").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state\.npz cannot be read .*: delete it and trial\.json beside it") as said:
        sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1)
    assert "\n" not in str(said.value)
    for name in ("state.npz", "trial.json"):
        (folder / name).unlink()
    assert sweep(ehr_config, tmp_path, RATES, num_trials=1, lanes=1) == whole


def test_what_a_kill_left_unfinished_is_removed_by_the_next_start(tmp_path):
    (tmp_path / ".state.npz.4711.partial.npz").write_bytes(b"half a file")
    (tmp_path / ".trial.json.4711.partial.json").write_text("another file's")
    keeper = trial_store.new_keeper(tmp_path, is_head=True)
    assert [path.name for path in tmp_path.iterdir()] == [".trial.json.4711.partial.json"]
    keeper.save({"w": np.zeros(3)}, trial_store.optim.Progress(learning_rate=0.1), True)
    assert (tmp_path / "state.npz").exists()


def test_the_state_of_a_resumed_trial_lies_on_the_host(tmp_path):
    """However many trials there are, no device holds them all."""
    weights = {"w": jnp.arange(3.0)}
    state = step.TrainState(jnp.int32(1), weights, {}, weights, jnp.float32(0.1))
    with contextlib.closing(trial_store.WholeKeeper(tmp_path)) as keeper:
        assert keeper.latest(jax.eval_shape(lambda: state)) is None
        keeper.save(state, trial_store.optim.Progress(learning_rate=0.1), True)
        keeper.finish()
        latest, _ = keeper.latest(jax.eval_shape(lambda: state))
        of_file, _ = trial_store.FileKeeper(tmp_path).latest(jax.eval_shape(lambda: state))
    for leaf in jax.tree.leaves((latest, of_file)):
        assert not isinstance(leaf, jax.Array)
    assert latest.params["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("latest/progress"), "progress"),
        (lambda d: d.pop("latest/params.w"), "/params.w is missing"),
        (lambda d: d.update({"latest/params.w": np.zeros(4)}), r"/params.w is of shape \(4,\)"),
        (lambda d: d.update({"latest/progress": np.array('{"epoch": 1, "more": 2}')}), "more"),
    ],
)
def test_a_file_that_lacks_an_entry_is_one_line(tmp_path, change, said):
    state = {"params": {"w": np.zeros(3)}}
    trial_store.FileKeeper(tmp_path).save(state, trial_store.optim.Progress(learning_rate=0.1), True)
    with np.load(tmp_path / "state.npz") as stored:
        entries = dict(stored)
    change(entries)
    np.savez(tmp_path / "state.npz", **entries)
    with pytest.raises(UserError, match=said) as refused:
        trial_store.FileKeeper(tmp_path).latest(state)
    assert "\n" not in str(refused.value) and "delete it and trial.json" in str(refused.value)


def _head(value):
    params = {"classifier": {"bias": np.full(3, value, np.float32)}}
    return step.TrainState(np.int32(value), params, {}, params, np.float32(0.1))


def test_a_file_keeps_the_latest_and_the_best_state_apart(tmp_path):
    progress = trial_store.optim.Progress(epoch=1, learning_rate=0.1, best_auroc=0.6, best_epoch=1)
    keeper = trial_store.FileKeeper(tmp_path)
    assert keeper.latest(_head(0.0)) is None
    keeper.save(_head(1.0), progress, True)
    trial_store.FileKeeper(tmp_path).latest(_head(0.0))
    again = trial_store.FileKeeper(tmp_path)
    again.latest(_head(0.0))
    again.save(_head(2.0), progress, False)
    (latest, _), (best, reached) = again.latest(_head(0.0)), again.best(_head(0.0))
    assert float(latest.params["classifier"]["bias"][0]) == 2.0 and float(best.params["classifier"]["bias"][0]) == 1.0
    assert reached == progress
    (tmp_path / "state.npz").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"state\.npz cannot be read"):
        again.latest(_head(0.0))
