"""Training: resumes exactly, starts from encoders, and refuses runs that cannot work."""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import time

import jax
import numpy as np
import pytest
from refusals import refused

from data_prep.synthetic import signal
from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, feed, metrics, parallel, records, schema, train
from medfuse_jax import run as run_lib
from medfuse_jax.data import missing
from medfuse_jax.report import pages, read_runs
from medfuse_jax.runs import alone, calibration, checkpoints, predictions, preflight, result
from medfuse_jax.runs import workdir as workdir_lib
from medfuse_jax.runs.progress import Progress
from medfuse_jax.runtime import compilation, hosts, watchdog
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
    return checkpoints.resume(checkpoints.open_manager(workdir), abstract)


@pytest.mark.parametrize(
    ("method", "placement", "task"),
    [
        pytest.param("medfuse", "stream", "tiny", marks=pytest.mark.slow),
        ("uni_ehr", "stream", "tiny"),
        ("uni_ehr", "device", "tiny"),
        ("uni_ehr", "device", "hourly"),
    ],
)
def test_a_stopped_run_resumes_exactly(request, tmp_path, monkeypatch, method, placement, task):
    """Stopped within the second epoch, it has the numbers of an undisturbed run, and each line is written once."""
    tiny_config = request.getfixturevalue(f"{task}_config")
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
    keep = ("phase", "epoch", "step", "train_loss", "num_steps", "val_loss", "val_auroc", "lr")
    rows_a, rows_b = ([{k: line.get(k) for k in keep} for line in _lines(d)] for d in (whole, stopped))
    assert rows_a == rows_b and len(rows_a) == 4


def test_a_signal_at_any_point_of_an_epoch_costs_nothing(ehr_config, tmp_path, monkeypatch):
    """In the epoch, after its last step, and in its validation, which a resumed run then does first."""
    whole = _train(ehr_config, tmp_path / "whole")
    num_steps = len(run_lib.open_run(ehr_config).train_plan(epoch=1))
    for stop_at, step in ((2, 2), (num_steps - 2, num_steps), (1, num_steps)):
        asked = itertools.count(1)
        with monkeypatch.context() as patched, pytest.raises(watchdog.Stopped, match=f"step {step} is saved"):
            patched.setattr(hosts, "must_stop", lambda: next(asked) == stop_at)  # noqa: B023
            _train(ehr_config, tmp_path / "stopped")
        assert checkpoints.open_manager(tmp_path / "stopped").latest_step() == step
    stopped = _train(ehr_config, tmp_path / "stopped")
    (state_a, progress_a), (state_b, progress_b) = _latest(ehr_config, whole), _latest(ehr_config, stopped)
    jax.tree.map(np.testing.assert_array_equal, state_a.params, state_b.params)
    assert progress_a == progress_b
    keep = ("phase", "epoch", "step", "train_loss", "val_loss", "val_auroc", "lr")
    rows_a, rows_b = ([{k: line.get(k) for k in keep} for line in _lines(d)] for d in (whole, stopped))
    assert rows_a == rows_b


@pytest.mark.parametrize(("still_ours", "phases"), [(2, ["train", "val"]), (3, ["train", "val", "train"])])
def test_a_run_that_another_process_has_taken_over_writes_nothing_more(ehr_config, tmp_path, still_ours, phases):
    """It is asked before and after each validation."""
    answers = iter([True] * still_ours + [False])
    with pytest.raises(train.TakenOver):
        _train(ehr_config, tmp_path, is_ours=lambda: next(answers))
    assert [line["phase"] for line in _lines(tmp_path)] == phases
    assert _latest(ehr_config, tmp_path)[1].epoch == 1


@pytest.mark.parametrize(
    "placement", [pytest.param("stream", marks=pytest.mark.slow), pytest.param("device", marks=pytest.mark.nightly)]
)
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


def test_processes_that_write_no_trace_stop_at_the_same_steps(tiny_config, tmp_path, monkeypatch):
    tiny_config.method, tiny_config.profile_steps = "uni_ehr", "2:3"
    run = run_lib.open_run(tiny_config)
    monkeypatch.setattr(hosts, "is_first", lambda: False)
    with contextlib.closing(train._Trace(run, tmp_path, 0)) as trace:
        assert [step for step in range(1, 6) if trace.needs(step)] == [1, 3]
        trace.reached(1, np.zeros(()))
        trace.reached(3, np.zeros(()))
    assert not (tmp_path / "profile").exists()


def test_tracing_steps_beyond_the_last_is_refused(tiny_config, tmp_path):
    tiny_config.method, tiny_config.num_epochs, tiny_config.profile_steps = "uni_ehr", 1, "2:300"
    with refused(field="config.profile_steps", value="2:300"):
        _train(tiny_config, tmp_path)


def test_weights_beyond_the_machines_memory_are_refused(ehr_config, monkeypatch):
    """They are counted alike on a kernel that this machine cannot trace."""
    run = run_lib.open_run(ehr_config)
    elsewhere = dataclasses.replace(run.options, model=run.options.model.clone(recurrence="cudnn"))
    shapes = [preflight._state_shapes(r) for r in (run, dataclasses.replace(run, options=elsewhere))]
    of_run, of_other = (sum(x.size for x in jax.tree.leaves(tree)) for tree in shapes)
    assert of_run == pytest.approx(of_other, abs=10)
    preflight.check(run, {})
    monkeypatch.setattr(hosts, "memory_bytes", lambda: 10_000)
    with refused(field="config.model"):
        preflight.check(run, {})


def test_a_finished_run_is_not_trained_again(tiny_config, tmp_path, capsys):
    tiny_config.method, tiny_config.num_epochs, tiny_config.recurrence = "uni_ehr", 1, "pallas"
    _train(tiny_config, tmp_path)
    assert "config.recurrence='pallas' needs a GPU; using 'chunks'" in capsys.readouterr().out
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _train(tiny_config, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


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


def test_a_finished_run_has_the_temperature_of_its_selected_epoch(ehr_config, tmp_path, monkeypatch):
    """The first of three epochs is made the best. Scoring the validation split again fits no other temperature."""
    ehr_config.num_epochs = 3
    aurocs = iter([0.6, 0.5, 0.4])
    monkeypatch.setattr(predictions, "selecting", lambda *of: (value := next(aurocs), {"val_auroc": value}))
    scaled = evaluate.evaluate(_train(ehr_config, tmp_path))["calibration"]["scaled"]
    assert _latest(ehr_config, tmp_path)[1].temperature == scaled["temperature"]
    assert json.loads((tmp_path / "result.json").read_text())["calibration"]["scaled"] == scaled
    of_val = evaluate.evaluate(tmp_path, result.Scored("val"))
    assert of_val["best_epoch"] == 1 and of_val["calibration"]["scaled"]["temperature"] == scaled["temperature"]
    val, test = (np.load(tmp_path / f"predictions_{split}.npz") for split in ("val", "test"))
    expected = calibration.fit_temperature(val["labels"], val["scores"])
    assert scaled["temperature"] == pytest.approx(expected, rel=1e-4) and abs(expected - 1) > 0.01
    described = calibration.describe(test["labels"], calibration.scale(test["scores"], expected))
    assert scaled["ece_macro"] == pytest.approx(described["ece_macro"], abs=1e-4)
    assert not (tmp_path / "temperature.json").exists()


def test_every_hour_is_scored_once(hourly_config, tmp_path):
    """Also that a shorter batch, of other stays and hours, changes no score, and that a prediction has its hour."""
    hourly_config.task, hourly_config.method, hourly_config.num_epochs = "length_of_stay", "uni_ehr", 1
    result = evaluate.evaluate(_train(hourly_config, tmp_path))
    rows = list(records.open_split(hourly_config.data.dir, "length_of_stay", "test"))
    with np.load(tmp_path / "predictions_test.npz") as stored:
        found = dict(stored)
    hours = [len(row["label"]) for row in rows]
    np.testing.assert_array_equal(found["stay_id"], np.repeat([row["stay_id"] for row in rows], hours))
    np.testing.assert_array_equal(found["hour"], np.concatenate([row["label_time_h"] for row in rows]))
    np.testing.assert_array_equal(found["labels"], np.concatenate([row["label"] for row in rows]))
    np.testing.assert_allclose(found["scores"].sum(1), 1, atol=1e-5)
    remaining = np.concatenate([row["los_h"] - row["label_time_h"] for row in rows])
    np.testing.assert_allclose(found["remaining_h"], np.maximum(remaining, 0), atol=1e-3)
    whole = result["subsets"]["all"]
    assert (result["resample"], whole["num_samples"]) == ("patient", sum(hours))
    assert whole["kappa"] == pytest.approx(metrics.kappa(found["labels"], found["scores"]))
    assert whole["mad_h"] == pytest.approx(np.abs(found["predicted_h"] - found["remaining_h"]).mean(), rel=1e-5)
    (by_hour,) = (entry for entry in result["subgroups"] if entry["by"] == "Hour of the stay")
    assert by_hour["groups"][0]["num_samples"] == (found["hour"] <= 24).sum() and "kappa" in by_hour["groups"][0]
    assert all(bin["num_stays"] <= len(rows) for bin in result["calibration"]["curve"])
    assert "scaled" not in result["calibration"]  # its labels exclude one another
    (line,) = (line for line in _lines(tmp_path) if line["phase"] == "val")
    assert {"val_auroc", "val_kappa"} <= line.keys()
    assert result["selected_by"].startswith("kappa")
    pages.write([tmp_path], tmp_path / "report")
    assert "by hour of the stay" in (tmp_path / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def changing_shards(tmp_path_factory):
    """The shards of a cohort with a phenotype that only the change between two X-rays shows."""
    from data_prep import build
    from data_prep.synthetic import tree

    root = tmp_path_factory.mktemp("changing")
    tree.write(root / "raw", num_stays=320, cxr_fraction=1.0, images_per_stay=0.0, change=True)
    raw = (root / "raw" / "mimic-iv", root / "raw" / "mimic-cxr")
    build.build(*raw, root / "shards", tasks=["pheno"], images="all")
    return root / "shards"


def _on_one_label(config, label):
    """Return a run on one of the task's labels and the first four hours of each stay, to train in seconds."""
    run = run_lib.open_run(config, jax.devices()[:1])
    k = run.dataset.labels.index(label)
    dataset = missing.cut_ehr(run.dataset, num_steps=2)
    index = {split: part | {"label": part["label"][:, k : k + 1]} for split, part in dataset.index.items()}
    dataset = dataclasses.replace(dataset, index=index, labels=(label,), buckets=(2,))
    return run_lib.Run(config, dataset, run_lib.step_options(config, dataset, (), run.devices), run.devices)


@pytest.mark.parametrize(
    ("method", "images"),
    [
        pytest.param("medfuse", "all", marks=pytest.mark.slow),
        pytest.param("medfuse", "last", marks=pytest.mark.slow),
        pytest.param("medfuse_attention", "all", marks=pytest.mark.nightly),
    ],
)
def test_a_change_between_two_x_rays_is_found_by_all_and_not_by_the_last(tiny_config, changing_shards, method, images):
    config = tiny_config
    config.method, config.data.dir, config.data.images = method, str(changing_shards), images
    config.image.rotation_deg, config.image.scale, config.image.translation = 0.0, (1.0, 1.0), 0.0
    config.model.resnet_width, config.model.fusion_hidden, config.model.dropout = 8, 16, 0.0
    config.learning_rate = 3e-3
    planted = {p.ccs: p.name for p in schema.PHENOTYPES}[signal.CHANGED]
    run = _on_one_label(config, planted)
    state, train_fn = parallel.replicate(run.fresh_state(), run.devices), feed.open_feed(run)
    for epoch in range(15):
        plan = run.train_plan(epoch)
        for moved, _ in train_fn(state, plan, 0, [len(plan)], jax.random.key(0)):
            state = moved
    eval_fn, include_N = parallel.compile_eval(run.options, "pmap", run.devices), run.dataset.usable("test")
    predicted = predictions.predict(run, eval_fn, state, "test", include_N)
    (auroc,) = metrics.auroc(predicted.label_NK, predicted.score_NK)
    assert auroc > 0.85 if images == "all" else 0.3 < auroc < 0.7


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


def test_each_modality_alone_is_logged_and_changes_no_weight(tiny_config, tmp_path):
    """The score of a stay without its X-ray is that of `evaluate --drop_cxr=1`."""
    tiny_config.method, tiny_config.encoders, tiny_config.num_epochs = "joint", "random", 1
    plain = _lines(_train(tiny_config, tmp_path / "plain"))
    tiny_config.eval.modalities_alone = True
    folder = _train(tiny_config, tmp_path / "alone")
    line = _lines(folder)[-1]
    assert {f"val_{m}_{n}" for m in ("loss", "auroc") for n in ("both", "ehr", "cxr")} <= line.keys()
    assert (line["val_loss"], line["val_auroc"]) == (plain[-1]["val_loss"], plain[-1]["val_auroc"])
    dropped = evaluate.evaluate(folder, result.Scored("val", drop_cxr=1.0))
    expected = dropped["subsets"]["had_both"]["auroc_macro"]
    assert line["val_auroc_ehr"] == pytest.approx(expected, abs=1e-6) != line["val_auroc_both"]
    assert "with one of them alone" in pages.page(read_runs.find_runs([folder]))


def test_a_method_without_both_modalities_has_none_alone(ehr_config):
    ehr_config.eval.modalities_alone = True
    assert alone.views(run_lib.open_run(ehr_config)) == {}
