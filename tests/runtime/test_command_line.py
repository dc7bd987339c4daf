"""command_line: one line for what the user can fix. tests/test_config.py runs whole commands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from refusals import refused

from medfuse_jax.runtime import command_line
from medfuse_jax.runtime.errors import TryLater, UserError

_PHENO = str(Path(__file__).parents[2] / "configs" / "pheno.py")


@pytest.mark.parametrize(
    ("arguments", "field", "nearest"),
    [
        ([f"--config={_PHENO.replace('pheno', 'phenotype')}"], "--config", _PHENO),
        ([f"--config={Path(_PHENO).parents[1] / 'README.md'}"], "--config", ""),
        ([f"--config={_PHENO}", "--config.learning_rat=1"], "--config.learning_rat", "--config.learning_rate"),
        ([f"--config={_PHENO}", "--config.model.ehr_hiden=1"], "--config.model.ehr_hiden", "--config.model.ehr_hidden"),
        ([f"--config={_PHENO}", "--config.batch_size.x=1"], "--config.batch_size.x", "--config.batch_size"),
        (["--config="], "--config", ""),
    ],
)
def test_unknown_config_file_or_field_names_the_nearest(arguments, field, nearest):
    with pytest.raises(UserError) as caught:
        command_line._check_config_flags(["main", *arguments])
    assert (caught.value.field, caught.value.nearest) == (field, nearest)
    assert "\n" not in str(caught.value)


def test_error_in_a_config_file_names_its_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="line 2: ZeroDivisionError") as caught:
        command_line._check_config_flags(["main", f"--config={path}"])
    assert caught.value.path == path


def test_a_config_file_that_returns_nothing_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config():\n    pass\n")
    with refused(field="--config", path=path):
        command_line._check_config_flags(["main", f"--config={path}"])


@pytest.mark.parametrize(
    ("name", "folder"),
    [("workdir", "/"), ("out", "/tmp/.."), ("workdir", "a\nb"), ("runs", "\x1b"), ("out", "a\u202eb")],
)
def test_the_root_and_control_characters_are_no_folder(name, folder):
    values = flags.FlagValues()
    flags.DEFINE_string(name, None, "A folder.", flag_values=values)
    values([name, f"--{name}={folder}"])
    with refused(field=f"--{name}", value=folder):
        command_line._check_folders(values)


def test_a_path_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "run", tmp_path):
        with pytest.raises(OSError) as caught:
            path.open("w")
        line = command_line.in_one_line(caught.value)
        assert line.startswith(f"error: {path}"[:200]) and "\n" not in line and command_line.status(caught.value) == 2
    with pytest.raises(FileNotFoundError) as caught:  # a fault of ours: it keeps its traceback
        (tmp_path / "gone").read_text()
    assert command_line.in_one_line(caught.value) == ""


def test_a_missing_flag_file_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["main", "--flagfile=/nowhere/flags"])
    with pytest.raises(SystemExit) as caught:
        command_line.DEFINE_config_file("config_of_this_test", "A config file.")
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and "/nowhere/flags" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name", command_line._FOLDERS)
def test_an_address_is_no_folder(name):
    values = flags.FlagValues()
    flags.DEFINE_string(name, None, "A folder.", flag_values=values)
    addresses, folders = ("gs://bucket/x", "s3:/bucket/x", "gs:bucket/x"), ("a:b/c", "./s3", "./gs:b", "a\u200db")
    for folder, is_address in (*((x, True) for x in addresses), *((x, False) for x in folders)):
        values([name, f"--{name}={folder}"])
        if is_address:
            with refused(field=f"--{name}", value=folder):
                command_line._check_folders(values)
        else:
            command_line._check_folders(values)


def test_only_a_flag_that_is_empty_by_default_may_be_empty():
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "A folder.", flag_values=values)
    flags.DEFINE_list("runs", None, "Folders.", flag_values=values)
    flags.DEFINE_string("data_dir", "", "A folder, '' for another.", flag_values=values)
    values(["main", "--data_dir="])
    command_line._check_not_empty(values)
    for name in ("out", "runs"):
        values.unparse_flags()
        values(["main", "--out=x", "--runs=y", f"--{name}="])
        with refused(field=f"--{name}", value=""):
            command_line._check_not_empty(values)


def test_a_flag_file_that_is_a_pipe_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "flags").write_text(f"--seed=1\n--flagfile={tmp_path / 'flags'}\n  --flagfile={tmp_path / 'pipe'}\n")
    for arguments in (
        ["--flagfile", f"{tmp_path / 'pipe'}"],
        [f"-flagfile={tmp_path / 'flags'}"],
        ["--flagfile=/dev/null"],
    ):
        with refused(field="--flagfile"):
            command_line._check_flag_files(arguments)
        monkeypatch.setattr("sys.argv", ["main", *arguments])
        with pytest.raises(SystemExit):
            command_line.DEFINE_config_file("config_of_that_test", "A config file.")
        with pytest.raises(SystemExit):
            command_line._parse_flags(["main", *arguments], pass_on_unknown=False)
    command_line._check_flag_files([f"--flagfile={tmp_path / 'missing'}", f"--flagfile={tmp_path}"])  # absl's to say


def test_a_file_is_no_workdir(tmp_path):
    """Said before the synthetic cohort is built."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "A folder.", flag_values=values)
    (tmp_path / "file").touch()
    values(["main", f"--workdir={tmp_path / 'file'}"])
    with refused(field="--workdir", value=str(tmp_path / "file")):
        command_line._check_folders(values)


def test_known_flags_pass():
    command_line._check_config_flags(["main", f"--config={_PHENO}", "--config.data.dir=x", "--workdir=y"])
    command_line._check_config_flags(["main", "--workdir=y"])


def test_errors_that_a_user_can_fix_are_one_line():
    for error in (MemoryError("Unable to allocate 210. GiB"), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")):
        line = command_line.in_one_line(error)
        assert line.startswith("error: ") and str(error) in line and command_line.status(error) == 2
    of_tensorstore = ValueError("RESOURCE_EXHAUSTED: Failed to write 87722 bytes to file 6: No space left on device")
    for error in (KeyboardInterrupt(), BrokenPipeError(), OSError("No space left on device"), of_tensorstore):
        assert "rerun" in command_line.in_one_line(error, resumes=True)
        assert "rerun" not in command_line.in_one_line(error)
        assert command_line.status(error) == 1
    assert command_line.in_one_line(UserError("a is b")) == "error: a is b"
    assert command_line.in_one_line(RuntimeError("INTERNAL")) == ""
    assert [command_line.status(error) for error in (UserError(""), TryLater(""))] == [2, 1]


def test_an_output_that_nobody_reads_ends_a_command_in_one_line():
    program = "from medfuse_jax.runtime import command_line; command_line.run(lambda argv: print('x'))"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read().strip() == command_line.in_one_line(BrokenPipeError())
    assert child.wait() == 1
