"""The table of docs/methods.md is what the code computes, and the page shows every method and ensemble rule."""

import re
from pathlib import Path

import documented
import jax
import jax.numpy as jnp
import pytest
from refusals import refused

from medfuse_jax import schema
from medfuse_jax.bench import flops
from medfuse_jax.ensemble import command
from medfuse_jax.models import registry

_ROOT = Path(__file__).parents[2]
_PAGE = (_ROOT / "docs" / "methods.md").read_text()
_ROWS = documented.made_table(_PAGE)
_COMMANDS = re.findall(r"`(python -m medfuse_jax\.\w+ --[^`]+)`", _PAGE)


def test_lstm_flops_are_those_of_xla():
    """A gradient of the weights at one time step, two layers; XLA also counts the gates' arithmetic."""
    rows, channels, width = 3, len(schema.CHANNELS), 32
    weights = [jnp.ones((n, 4 * width)) for n in (channels, width, width, width)]

    def loss(w, x, h):
        first = jnp.tanh(x @ w[0] + h @ w[1])
        return (first[:, :width] @ w[2] + h @ w[3]).sum()

    gradient = jax.jit(jax.value_and_grad(loss, (0, 2)))
    lowered = gradient.lower(weights, jnp.ones((rows, channels)), jnp.ones((rows, width)))
    products = rows * flops.lstm_flops(1, width)
    assert products <= lowered.cost_analysis()["flops"] <= 1.1 * products
    assert flops.lstm_flops(24, width) == 24 * flops.lstm_flops(1, width)


def test_table_shows_the_lstm_flops_of_trained_and_of_frozen_encoders():
    assert flops.training_flops("uni_ehr") == {"time_step": flops.lstm_flops(1), "cxr": 0.0}
    assert float(_ROWS["uni_ehr"][3]) == pytest.approx(flops.lstm_flops(1) / 1e6, abs=0.005)
    assert float(_ROWS["early"][3]) == pytest.approx(flops.lstm_flops(1, trained=False) / 1e6, abs=0.005)


def test_the_cost_of_a_transformer_is_not_reported_as_the_lstms():
    with refused(field="ehr_kind"):
        flops.training_flops("uni_ehr", ehr_kind="transformer")


def test_table_is_written_between_its_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(flops, "table", lambda methods, known: "new")
    (tmp_path / "page.md").write_text(f"before\n{flops.BEGIN}\nold\n{flops.END}\nafter\n")
    flops.write(tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == f"before\n{flops.BEGIN}\nnew\n{flops.END}\nafter\n"


def test_only_the_rows_of_given_methods_are_counted(monkeypatch):
    monkeypatch.setattr(flops, "_table_row", lambda method: f"| `{method}` | new |")
    known = "| method |\n|---|\n| `early` | known |\n| `uni_ehr` | known |"
    assert flops.table(["uni_ehr"], known).splitlines()[2:] == ["| `uni_ehr` | new |", "| `early` | known |"]
    assert "known" not in flops.table([], known)


def test_page_shows_how_to_train_every_method_except_those_chosen_by_validation():
    trained = set(re.findall(r"--config\.method=(\w+)", " ".join(_COMMANDS))) | {"medfuse"}
    assert set(registry.METHODS) - trained == {"mmtm3", "daft4"}
    rules = set(re.findall(r"--rule=(\w+)", " ".join(_COMMANDS)))
    assert rules == set(command.RULES) - {"average"}
