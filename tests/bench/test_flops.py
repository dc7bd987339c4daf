"""docs/methods.md: its table is what the code gives, and every method and rule is in it."""

import re
from pathlib import Path

import documented
import pytest

from medfuse_jax import ensemble
from medfuse_jax.bench import flops
from medfuse_jax.models import registry
from medfuse_jax.models.recurrence import chunks

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "methods.md").read_text()
_ROWS = documented.made_table(_PAGE)
_BETWEEN_VERSIONS = 0.05  # how far XLA's counts of operations of the same model lie apart
_COMMANDS = re.findall(r"`(python -m medfuse_jax\.\w+ --[^`]+)`", _PAGE)


@pytest.mark.slow
def test_every_method_is_in_the_table_with_its_parameters():
    assert {method: row[2] for method, row in _ROWS.items()} == {
        method: f"{flops.num_params(method):,}" for method in registry.METHODS
    }


def test_operations_of_the_lstm_are_those_of_its_products():
    counted = flops.training_flops("uni_ehr")
    assert counted["cxr"] == 0
    products = 3 * 2 * 4 * 256 * (76 + 256 + 256 + 256)  # forward, and backward to inputs and kernels
    products -= 2 * 4 * 256 * 76  # no gradient of the series itself is asked for
    assert products < counted["time_step"] < 1.1 * products
    assert float(_ROWS["uni_ehr"][3]) == pytest.approx(flops["time_step"] / 1e6, rel=_BETWEEN_VERSIONS)
    assert chunks.CHUNK_STEPS == (16, 4)  # left as it was


def test_a_table_is_put_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "table", lambda: "new")
    (tmp_path / "page.md").write_text(f"before\n{flops._BEGIN}\nold\n{flops._END}\nafter\n")
    flops.write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == f"before\n{flops._BEGIN}\nnew\n{flops._END}\nafter\n"


def test_the_rows_train_every_method_but_the_one_left_to_validation():
    trained = set(re.findall(r"--config\.method=(\w+)", " ".join(_COMMANDS))) | {"medfuse"}
    assert set(registry.METHODS) - trained == {"mmtm3", "daft4"}
    rules = set(re.findall(r"--rule=(\w+)", " ".join(_COMMANDS)))
    assert rules == set(ensemble.METHODS) - {"average"}
