"""log: whole lines, none twice after a resume, the same values in TensorBoard."""

import json
import threading
from pathlib import Path

import pytest

from medfuse_jax.runs.log import RunLog
from medfuse_jax.runtime import files


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_hold_phase_epoch_step_and_values(tmp_path):
    log = RunLog(tmp_path, "run", num_steps=10)
    log.write("train", 1, 5, train_loss=0.5)
    log.write("val", 1, 5, val_loss=0.4, val_auroc=0.7)
    log.close()
    first, second = _lines(tmp_path)
    assert (first["phase"], first["epoch"], first["step"], first["train_loss"]) == ("train", 1, 5, 0.5)
    assert second["val_auroc"] == 0.7 and second["time_s"] >= first["time_s"]
    assert any(path.stat().st_size > 0 for path in (tmp_path / "tensorboard").iterdir())


def test_resumed_log_drops_steps_after_the_checkpoint_and_a_partial_line(tmp_path):
    log = RunLog(tmp_path, "run", num_steps=10)
    for step in (5, 10):
        log.write("train", step // 5, step, train_loss=1 / step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "va')
    log = RunLog(tmp_path, "run", num_steps=10, resume_step=5)
    log.write("train", 2, 10, train_loss=0.25)
    log.close()
    assert [(line["step"], line["train_loss"]) for line in _lines(tmp_path)] == [(5, 0.2), (10, 0.25)]


def test_nan_is_written_as_null_and_not_to_tensorboard(tmp_path, caplog):
    log = RunLog(tmp_path, "run", num_steps=10)
    log.write("val", 1, 5, val_auroc=float("nan"), val_loss=float("inf"), lr=0.5)
    log.close()

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (json.loads(t, parse_constant=refuse) for t in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["val_auroc"], line["val_loss"], line["lr"]) == (None, None, 0.5)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"val/lr" in events.read_bytes() and b"val/val_auroc" not in events.read_bytes()
    assert not caplog.records, "nobody is warned of it in every epoch"


def test_resume_drops_damaged_lines_atomically(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n{"step": 2, "ph\xff\n{"step": 3}\n{"step": 4}\n'
    path.write_bytes(content)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
        RunLog(tmp_path, "run", num_steps=10, resume_step=3, quiet=True)
    assert path.read_bytes() == content
    RunLog(tmp_path, "run", num_steps=10, resume_step=3, quiet=True).close()
    assert [line["step"] for line in _lines(tmp_path)] == [1, 3]


def test_a_changed_number_is_noticed(tmp_path, capsys):
    log = RunLog(tmp_path, "run", num_steps=10, quiet=True)
    for step in (1, 2, 3):
        log.write("val", step, step, val_auroc=0.625)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("0.625", "0.725") + lines[2])
    assert [line and line["step"] for line in files.read_json_lines(path)] == [1, None, 3]
    RunLog(tmp_path, "run", num_steps=10, resume_step=3, quiet=True)
    assert [line["step"] for line in files.read_json_lines(path)] == [1, 3]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and f"{path}: dropped damaged lines (1, the first is line 2)" in printed


def test_quiet_logs_hold_no_open_file_and_no_thread(tmp_path):
    """A sweep has hundreds of them at once."""
    open_files = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    before, logs = (len(list(open_files.iterdir())), threading.active_count()), []
    for number in range(20):
        (tmp_path / str(number)).mkdir()
        logs.append(RunLog(tmp_path / str(number), "run", num_steps=10, quiet=True))
        logs[-1].write("val", 1, 5, val_loss=0.4)
    assert (len(list(open_files.iterdir())), threading.active_count()) == before
    for log in logs:
        log.close()
    assert [line["val_loss"] for line in _lines(tmp_path / "19")] == [0.4]


def test_lines_are_printed_without_a_terminal(tmp_path, capsys):
    log = RunLog(tmp_path, "run", num_steps=10)
    log.line("epoch 1/2")
    log.close()
    assert capsys.readouterr().out == "run: epoch 1/2\n"
