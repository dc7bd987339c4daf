"""The attribution of one stay: complete, of its own hours alone, and kept out of what is shared."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from refusals import refused

from medfuse_jax import run as run_lib
from medfuse_jax import schema
from medfuse_jax.attribution import page, stay
from medfuse_jax.report import pages, read_runs
from medfuse_jax.runs import checkpoints, workdir
from medfuse_jax.runs.progress import Progress

_ROOT = Path(__file__).parents[2]


def _saved(config, folder: Path) -> run_lib.Run:
    """Save a run's initial weights as its best checkpoint."""
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    manager = checkpoints.open_manager(folder)
    checkpoints.save(manager, run.fresh_state(), Progress(epoch=1, best_epoch=1), is_best=True)
    manager.wait_until_finished()
    manager.close()
    return run


@pytest.fixture(scope="module")
def fusion(shared_tiny_config, tmp_path_factory):
    """(run, workdir) of joint fusion, whose score is linear in the two encoders' features."""
    config = shared_tiny_config.copy_and_resolve_references()
    config.method, config.encoders = "joint", "random"
    folder = tmp_path_factory.mktemp("fusion")
    return _saved(config, folder), folder


@pytest.fixture(scope="module")
def paired(fusion):
    run, folder = fusion
    index = run.dataset.index["test"]
    stay_id = int(index["stay_id"][np.flatnonzero(index["has_cxr"])[0]])
    return stay.explain(folder, stay_id), index["length"][index["stay_id"] == stay_id][0]


def test_the_shares_of_the_series_add_up_and_stay_within_its_hours(paired):
    found, length = paired
    assert found.ehr_TF.shape == (length, len(schema.CHANNELS)) and np.abs(found.ehr_TF).sum() > 0
    difference = found.score - found.baseline
    assert found.ehr_TF.sum() == pytest.approx(difference, abs=0.01 * max(abs(difference), 0.1) + 1e-5)
    assert found.variables_TV.sum() == pytest.approx(found.ehr_TF.sum(), abs=1e-5)
    assert found.variables_TV.shape == (length, len(schema.VARIABLES))


def test_the_x_ray_is_shown_as_the_model_sees_it(paired):
    found, _ = paired
    assert found.image_PCC.shape == found.shown_PCC.shape == (1, 32, 32)
    assert found.shown_PCC.min() >= 0 and found.shown_PCC.max() <= 1 and np.abs(found.image_PCC).max() > 0


def test_the_page_warns_and_no_report_includes_it(paired, fusion):
    found, _ = paired
    _, folder = fusion
    text = page.write(found)
    assert "one patient" in text and text.count("<svg") == 2 and str(found.stay_id) in text
    (folder / "attributions").mkdir(exist_ok=True)
    (folder / "attributions" / f"stay_{found.stay_id}.html").write_text(text)
    assert str(found.stay_id) not in pages.page(read_runs.find_runs([folder]))


def test_stays_and_labels_that_there_are_not_are_refused(fusion):
    _, folder = fusion
    with refused(field="--stay", value=5):
        stay.explain(folder, 5)
    stay_id = int(fusion[0].dataset.index["val"]["stay_id"][0])
    with refused(field="--label", value="Shok", nearest="Shock"):
        stay.explain(folder, stay_id, "Shok")


@pytest.mark.nightly
def test_the_command_writes_for_its_owner_alone(fusion):
    run, folder = fusion
    index = run.dataset.index["test"]
    stay_id = int(index["stay_id"][np.flatnonzero(~index["has_cxr"])[0]])  # without an X-ray
    command = [sys.executable, "-m", "medfuse_jax.attribution", f"--workdir={folder}", f"--stay={stay_id}"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for suffix in ("html", "npz"):
        assert (folder / "attributions" / f"stay_{stay_id}.{suffix}").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_an_hourly_task_explains_its_last_hour(hourly_config, tmp_path):
    hourly_config.method = "uni_ehr"
    run = _saved(hourly_config, tmp_path)
    number = int(np.argmax(run.dataset.hours["test"].count_N))
    found = stay.explain(tmp_path, int(run.dataset.index["test"]["stay_id"][number]))
    difference = found.score - found.baseline
    assert found.ehr_TF.sum() == pytest.approx(difference, abs=0.01 * max(abs(difference), 0.1) + 1e-5)
    hours = run.dataset.hours["test"]
    last = hours.first_N[number] + hours.count_N[number] - 1
    assert found.hour == hours.time_h_S[last]
    assert not np.abs(found.ehr_TF[hours.steps_S[last] :]).any()  # nothing after the hour
