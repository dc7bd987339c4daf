"""Training: resumes exactly, starts from encoders, and refuses runs that cannot work."""

import contextlib
import functools
import gzip
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, feed, train
from medfuse_jax import run as run_lib
from medfuse_jax.models import registry
from medfuse_jax.runs import checkpoints, sources, warm_start
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import compilation
from medfuse_jax.runtime.errors import UserError


def _train(config, workdir, **kwargs):
    run = run_lib.open_run(config)
    workdir_lib.claim(workdir, run)
    train.train(run, workdir, **kwargs)
    return workdir


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _latest(config, workdir):
    abstract = run_lib.open_run(config).abstract_state()
    return checkpoints.restore_latest(checkpoints.open_manager(workdir), abstract)


@pytest.mark.parametrize(("method", "placement"), [("medfuse", "stream"), ("uni_ehr", "device")])
def test_a_stopped_run_resumes_exactly(tiny_config, tmp_path, monkeypatch, method, placement):
    """Stopped within the second epoch, it has the numbers of an undisturbed run, and each line is written once."""
    tiny_config.checkpoint_every_steps = 2
    tiny_config.method, tiny_config.placement = method, placement
    monkeypatch.setattr(feed, "open_feed", functools.partial(feed.open_feed, one_call=True))  # as on an accelerator
    whole = _train(tiny_config, tmp_path / "whole")
    save, saves = checkpoints.save, []

    def stop_within_the_second_epoch(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(args)
        if len(saves) == 3:
            args[0].wait_until_finished()
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", stop_within_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        _train(tiny_config, tmp_path / "stopped")
    monkeypatch.setattr(checkpoints, "save", save)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "tra')  # a kill can leave half a line
    stopped = _train(tiny_config, tmp_path / "stopped")

    (state_a, progress_a), (state_b, progress_b) = _latest(tiny_config, whole), _latest(tiny_config, stopped)
    assert int(state_a.step) == int(state_b.step) > 4
    jax.tree.map(np.testing.assert_array_equal, state_a.params, state_b.params)
    assert progress_a == progress_b
    keep = ("phase", "epoch", "step", "val_loss", "val_auroc", "lr")
    rows_a, rows_b = ([{k: line.get(k) for k in keep} for line in _lines(d)] for d in (whole, stopped))
    assert rows_a == rows_b and len(rows_a) == 4


@pytest.mark.parametrize("placement", [pytest.param("stream", marks=pytest.mark.slow), "device"])
@pytest.mark.slow
def test_a_trace_of_the_wanted_steps_is_written(tiny_config, tmp_path, monkeypatch, placement):
    tiny_config.method, tiny_config.num_epochs, tiny_config.placement = "uni_ehr", 1, placement
    tiny_config.profile_steps = "2:3"
    monkeypatch.setattr(feed, "open_feed", functools.partial(feed.open_feed, one_call=True))
    _train(tiny_config, tmp_path)
    (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()  # where TensorBoard looks
    assert list(folder.glob("*.xplane.pb"))
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    numbers = {event["args"]["step_num"] for event in events if "step_num" in event.get("args", {})}
    assert numbers == ({"2", "3"} if placement == "stream" else {"2"})


def test_tracing_steps_beyond_the_last_is_refused(tiny_config, tmp_path):
    tiny_config.method, tiny_config.num_epochs, tiny_config.profile_steps = "uni_ehr", 1, "2:300"
    with refused(field="config.profile_steps", value="2:300"):
        _train(tiny_config, tmp_path)


def test_a_finished_run_is_not_trained_again(tiny_config, tmp_path, capsys):
    tiny_config.method, tiny_config.num_epochs, tiny_config.recurrence = "uni_ehr", 1, "pallas"
    _train(tiny_config, tmp_path)
    assert "config.recurrence='pallas' needs a GPU; using 'chunks'" in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _train(tiny_config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_encoders_start_from_their_pretraining(tiny_config, tmp_path):
    pretrained = tiny_config.copy_and_resolve_references()
    pretrained.method, pretrained.num_epochs, pretrained.seed = "uni_ehr", 1, 7
    _train(pretrained, tmp_path / "ehr")
    source = sources.reopen(tmp_path / "ehr")
    best = checkpoints.restore_best(tmp_path / "ehr", source.abstract_state())
    fresh = run_lib.open_run(tiny_config).fresh_state()
    started = warm_start.begin(fresh, {"ehr": (tmp_path / "ehr", source)})
    jax.tree.map(np.testing.assert_array_equal, started.params["ehr_encoder"], best.params["ehr_encoder"])
    jax.tree.map(np.testing.assert_array_equal, started.params["cxr_encoder"], fresh.params["cxr_encoder"])
    kernel = lambda state: np.asarray(state.params["ehr_encoder"]["layer0"]["input_kernel"])  # noqa: E731
    assert np.abs(kernel(started) - kernel(fresh)).max() > 1e-3


@pytest.mark.parametrize(
    "method",
    [m if m in ("uni_ehr", "medfuse", "daft3") else pytest.param(m, marks=pytest.mark.slow) for m in registry.METHODS],
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
    assert all((leaf == "cxr").all() for leaf in jax.tree.leaves(started.batch_stats))
    assert ("stage4_block0" in started.params.get("cxr_encoder", {})) == (method not in ("uni_ehr", "daft3"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"method": "daft3"}, {}),  # which has no stage 4
        ({"model.resnet_stage_sizes": (1, 2, 1, 1)}, {}),
        ({}, {"model.resnet_stage_sizes": (1, 2, 1, 1)}),
        ({"model.resnet_stage_sizes": (1, 1, 2, 1)}, {"method": "daft3"}),
    ],
)
def test_an_image_encoder_with_fewer_or_other_stages_is_refused(tiny_config, tmp_path, theirs, ours):
    def opened(changes):
        config = tiny_config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        return run_lib.open_run(config)

    with refused(field="config.init.cxr"):
        sources.check(opened(ours), "cxr", tmp_path, opened(theirs))


@pytest.mark.slow
def test_unified_learns_from_x_rays_with_labels_of_their_own(tiny_config, tmp_path):
    """In one epoch batches of stays and of X-rays alternate, and every classifier changes."""
    tiny_config.method, tiny_config.num_epochs = "unified", 1
    run = run_lib.open_run(tiny_config)
    assert len(run.train_plan(1).cxr) > 0
    _train(tiny_config, tmp_path)
    (state, _), fresh = _latest(tiny_config, tmp_path), run.fresh_state()
    assert int(state.step) == len(run.train_plan(1))
    for head in ("classifier", "ehr_classifier", "cxr_classifier"):
        assert np.abs(state.params[head]["kernel"] - fresh.params[head]["kernel"]).max() > 1e-5
    tiny_config.loss.cxr_only = 0.0
    assert run_lib.open_run(tiny_config).dataset.cxr_dataset is None


@pytest.mark.slow
def test_another_classifier_of_a_model_is_scored_by_name(tiny_config, tmp_path, monkeypatch):
    """The model is untrained, to save time."""
    tiny_config.method = "unified"
    run = run_lib.open_run(tiny_config)
    workdir_lib.claim(tmp_path / "unified", run)
    fresh, index = (run.fresh_state(), Progress()), run.dataset.index["test"]
    monkeypatch.setattr(checkpoints, "restore_best_with_progress", lambda workdir, state: fresh)
    result = evaluate.evaluate(tmp_path / "unified", evaluate.Scored(head="joint"))
    assert (result["head"], list(result["subsets"])) == ("joint", ["all", "paired"])
    assert result["num_left_out"] == (~index["has_cxr"]).sum()
    with np.load(tmp_path / "unified" / "predictions_test_joint.npz") as stored:
        np.testing.assert_array_equal(stored["stay_id"], index["stay_id"][index["has_cxr"]])
    assert json.loads((tmp_path / "unified" / "result_test_joint.json").read_text())["head"] == "joint"
    with refused(field="--head", nearest="ehr_only"):
        evaluate.evaluate(tmp_path / "unified", evaluate.Scored(head="ehr_onyl"))
    tiny_config.method = "medfuse"
    workdir_lib.claim(tmp_path / "medfuse", run_lib.open_run(tiny_config))
    with refused(field="--head", value="ehr_only"):
        evaluate.evaluate(tmp_path / "medfuse", evaluate.Scored(head="ehr_only"))


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"method": "uni_cxr", "task": "radiology"}, "ehr"), ({"model.ehr_hidden": 16}, "ehr"), ({}, "cxr")],
)
def test_an_encoder_that_the_method_or_the_source_lacks_is_refused(tiny_config, tmp_path, changes, name):
    pretrained = tiny_config.copy_and_resolve_references()
    pretrained.method = "uni_ehr"
    tiny_config.update_from_flattened_dict(changes)
    run, source = (run_lib.open_run(config) for config in (tiny_config, pretrained))
    with refused(field=f"config.init.{name}"):
        sources.check(run, name, tmp_path / "source", source)


@pytest.mark.parametrize(("theirs", "ours"), [("joint", "early"), ("mmtm3", "mmtm4"), ("medfuse", "medfuse_attention")])
def test_starting_from_a_whole_model_of_another_method_is_refused(tiny_config, tmp_path, theirs, ours):
    source, run = (run_lib.open_run(_with_method(tiny_config, method)) for method in (theirs, ours))
    with refused(field="config.init.model"):
        sources.check(run, "model", tmp_path, source)


def test_joint_and_joint_zeros_are_the_same_model(tiny_config, tmp_path):
    source, run = (run_lib.open_run(_with_method(tiny_config, m)) for m in ("joint", "joint_zeros"))
    sources.check(run, "model", tmp_path, source)


def _with_method(config, method):
    config = config.copy_and_resolve_references()
    config.method = method
    return config


def test_an_encoder_trained_on_test_patients_is_refused(tiny_config, tmp_path):
    run, source = (run_lib.open_run(tiny_config) for _ in range(2))
    sources.check(run, "ehr", tmp_path, source)
    seen = source.dataset.index["train"]["subject_id"]
    seen[:2] = run.dataset.index["test"]["subject_id"][0], run.dataset.index["val"]["subject_id"][0]
    with refused(path=Path(tiny_config.data.dir)):
        sources.check(run, "ehr", tmp_path, source)


def test_the_rate_excludes_compilation(tiny_config, tmp_path, monkeypatch):
    """The steps are simulated: the first one's compilation takes all their time."""
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 1

    def open_feed(*args, **kwargs):
        def feed(state, plan, start, stops, key):
            time.sleep(0.5)
            jax.monitoring.record_event_duration_secs(compilation._COMPILED, 0.5)
            for _ in range(start, len(plan)):
                yield state, np.float32(0.5)

        return feed

    monkeypatch.setattr(feed, "open_feed", open_feed)
    _train(tiny_config, tmp_path)
    (line,) = (line for line in _lines(tmp_path) if line["phase"] == "train")
    assert line["samples_per_s"] > 2 * line["num_steps"] * tiny_config.batch_size / 0.5


def test_a_loss_that_is_not_finite_stops_the_run(tiny_config, tmp_path, monkeypatch):
    tiny_config.method, tiny_config.learning_rate = "uni_ehr", 1.0
    fresh_state = run_lib.Run.fresh_state

    def broken(self):
        return jax.tree.map(lambda x: x * np.nan if x.ndim == 2 else x, fresh_state(self))

    monkeypatch.setattr(run_lib.Run, "fresh_state", broken)
    with refused(field="config.learning_rate", value=1.0):
        _train(tiny_config, tmp_path)


def test_weights_after_a_loss_that_is_not_finite_are_not_saved(tiny_config, tmp_path, monkeypatch):
    """The steps are simulated: the third one's loss is nan, and the latest checkpoint is the second's."""
    tiny_config.method, tiny_config.checkpoint_every_steps, tiny_config.batch_size = "uni_ehr", 1, 8

    def open_feed(*args, **kwargs):
        def feed(state, plan, start, stops, key):
            for step in range(start, len(plan)):
                state = state.replace(step=state.step + 1)
                yield state, np.float32(0.5 if step < 2 else np.nan)

        return feed

    monkeypatch.setattr(feed, "open_feed", open_feed)
    with pytest.raises(UserError, match="the loss of step 3 is nan"):
        _train(tiny_config, tmp_path)
    with contextlib.closing(checkpoints.open_manager(tmp_path)) as manager:
        assert manager.latest_step() == 2


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tiny_config):
    tiny_config.batch_size = 15
    with pytest.raises(UserError, match=r"config\.batch_size is 15, not divisible by 2 devices; use 14 or 16"):
        run_lib.open_run(tiny_config)


def test_the_whole_evaluation_scores_every_test_stay_once(tiny_config, tmp_path):
    tiny_config.num_epochs = 1
    result = evaluate.evaluate(_train(tiny_config, tmp_path))
    index = run_lib.open_run(tiny_config).dataset.index["test"]
    with np.load(tmp_path / "predictions_test.npz") as stored:
        np.testing.assert_array_equal(stored["stay_id"], index["stay_id"])
        np.testing.assert_array_equal(stored["labels"], index["label"])
        assert np.isfinite(stored["scores"]).all() and stored["scores"].std() > 0
    subsets = {name: part["num_samples"] for name, part in result["subsets"].items()}
    paired = int(index["has_cxr"].sum())
    assert subsets == {"all": len(index["stay_id"]), "paired": paired, "unpaired": len(index["stay_id"]) - paired}
    assert json.loads((tmp_path / "result.json").read_text())["num_params"] == result["num_params"] > 1000


@pytest.mark.slow
def test_evaluation_does_not_depend_on_its_batch_size(tiny_config, tmp_path):
    tiny_config.num_epochs = 1
    _train(tiny_config, tmp_path)
    scores = []
    for batch_size in (4, 64):
        tiny_config.eval.batch_size = batch_size
        config_lib.save(tiny_config, tmp_path / "config.json")
        evaluate.evaluate(tmp_path)
        with np.load(tmp_path / "predictions_test.npz") as stored:
            scores.append(stored["scores"])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_evaluating_a_workdir_without_a_run_or_without_weights_is_refused(tmp_path, tiny_config):
    with refused(path=tmp_path / "config.json"):
        evaluate.evaluate(tmp_path)
    workdir_lib.claim(tmp_path, run_lib.open_run(tiny_config))
    with refused(path=tmp_path / "checkpoints"):
        evaluate.evaluate(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tiny_config):
    tiny_config.method, tiny_config.num_epochs = "uni_ehr", 1
    _train(tiny_config, tmp_path)
    tiny_config.model.ehr_hidden = 16
    config_lib.save(tiny_config, tmp_path / "config.json")
    with refused(path=next((tmp_path / "checkpoints").glob("[0-9]*"))):
        evaluate.evaluate(tmp_path)
