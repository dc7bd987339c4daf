"""docs/methods.md: its table is what the code gives, its commands are valid, every method is in it."""

import re
import runpy
from pathlib import Path

import pytest

from medfuse_jax import config as config_lib
from medfuse_jax import costs, ensemble
from medfuse_jax.models import chunked_lstm, methods

_ROOT = Path(__file__).parent.parent
_PAGE = (_ROOT / "docs" / "methods.md").read_text()
_COMMANDS = re.findall(r"`(python -m medfuse_jax\.\w+ --[^`]+)`", _PAGE)


def _rows() -> dict[str, list[str]]:
    made = _PAGE.partition(costs._BEGIN)[2].partition(costs._END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.strip().splitlines()[2:]]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_method_is_in_the_table_with_its_parameters():
    assert {method: row[2] for method, row in _rows().items()} == {
        method: f"{costs.num_params(method):,}" for method in methods.METHODS
    }


def test_operations_of_the_lstm_are_those_of_its_products():
    flops = costs.training_flops("uni_ehr")
    assert flops["film"] == 0
    products = 3 * 2 * 4 * 256 * (76 + 256 + 256 + 256)  # forward, and backward to inputs and kernels
    products -= 2 * 4 * 256 * 76  # no gradient of the series itself is asked for
    assert products < flops["time_step"] < 1.1 * products
    assert _rows()["uni_ehr"][3] == f"{flops['time_step'] / 1e6:.2f}"
    assert chunked_lstm.CHUNK_STEPS == 16  # left as it was


@pytest.mark.slow
def test_the_whole_table_is_current():
    assert costs.table() in _PAGE


def test_a_table_is_put_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "table", lambda: "new")
    (tmp_path / "page.md").write_text(f"before\n{costs._BEGIN}\nold\n{costs._END}\nafter\n")
    costs.write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == f"before\n{costs._BEGIN}\nnew\n{costs._END}\nafter\n"


def _config(command: str):
    """The config a command asks for."""
    words = command.split()
    options = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    config = runpy.run_path(str(_ROOT / options.pop("config")))["get_config"]()
    for name, value in options.items():
        path = name.removeprefix("config.")
        node, last = config, path.split(".")[-1]
        for part in path.split(".")[:-1]:
            node = node[part]
        node[last] = type(node[last])(value)
    return config


@pytest.mark.parametrize("command", [c for c in _COMMANDS if "medfuse_jax.main" in c], ids=lambda c: c.split()[4:5])
def test_a_rows_command_is_a_valid_config(command):
    config = _config(command)
    config_lib.validate(config)
    for stage in config_lib.stages(config).values():
        config_lib.validate(stage)
    assert f"{config.learning_rate:.3e}".replace("e-0", "e-") in _PAGE.replace("1e-4", "1.000e-4")


def test_the_rows_train_every_method_but_the_one_left_to_validation():
    trained = {_config(c).method for c in _COMMANDS if "medfuse_jax.main" in c}
    assert set(methods.METHODS) - trained == {"mmtm3", "daft4"}
    rules = {re.search(r"--rule=(\w+)", c).group(1) for c in _COMMANDS if "--rule" in c}
    assert rules == set(ensemble.METHODS) - {"average"}
