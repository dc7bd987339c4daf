"""Further modalities: the static features, and the page on how to add your own."""

import json
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import batch, random_variables, shapes, tiny_model
from refusals import refused

from medfuse_jax import config as config_lib
from medfuse_jax import evaluate, records, schema, step, train
from medfuse_jax import run as run_lib
from medfuse_jax.data import batches
from medfuse_jax.data.dataset import open_dataset
from medfuse_jax.data.modalities import loading, static
from medfuse_jax.models import registry
from medfuse_jax.models.model import init_variables, variable_shapes
from medfuse_jax.runs import sources, workdir
from medfuse_jax.runtime.errors import UserError

_PAGE = Path(__file__).parents[2] / "docs" / "encoders.md"
_METHODS = registry.with_field("modalities")


def _part(ages, sexes, admissions, units) -> dict:
    texts = dict(zip(schema.STATIC_TEXTS, (np.array(x, str) for x in (sexes, admissions, units))))
    return {"stay_id": np.arange(len(ages)), "age": np.array(ages, np.float32), **texts}


_TRAIN = _part([40, np.nan, 80, np.nan], ["F", "M", "", ""], ["EW EMER.", "", "URGENT", ""], ["MICU"] * 3 + [""])


def test_static_values_match_those_computed_by_hand():
    # age, unknown | F M ? | EW EMER. URGENT ? | MICU ?
    expected = [
        [-1, 0, 1, 0, 0, 1, 0, 0, 1, 0],
        [0, 1, 0, 1, 0, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 0, 1, 0, 1, 0],
        [np.nan] * 10,
    ]
    np.testing.assert_array_equal(static.table(_TRAIN, _TRAIN), np.array(expected, np.float32))


def test_categories_outside_the_train_split_are_unknown():
    other = _part([60, 60], ["M", "X"], ["URGENT", "AMBULATORY"], ["CVICU", "MICU"])
    values = static.table(other, _TRAIN)
    np.testing.assert_array_equal(values[0], [0, 0, 0, 1, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(values[1], [0, 0, 0, 0, 1, 0, 0, 1, 1, 0])
    assert static.table(other, other).shape != values.shape  # its own categories would be others


def test_the_index_matches_the_records(shards):
    for task in ("pheno", "radiology"):
        index = records.index(shards, task, "test")
        for i, record in enumerate(records.open_split(shards, task, "test")):
            np.testing.assert_equal(index["age"][i], record["age"])
            assert all(index[field][i] == record[field] for field in schema.STATIC_TEXTS)
    assert set(records.index(shards, "pheno", "test")["gender"]) == {"F", "M"}


def test_batches_hold_the_values_of_their_records(shards):
    dataset = open_dataset(shards, "pheno", modalities=loading.load("static"))
    rows = {"record": np.array([[3, 0], [-1, 5]]), "row_id": np.arange(4).reshape(2, 2)}
    made = batches.assemble(dataset.columns("val"), rows)
    expected = static.table(dataset.index["val"], dataset.index["train"])
    np.testing.assert_array_equal(made["extra_static"][0], expected[[3, 0]])
    np.testing.assert_array_equal(made["extra_static"][1, 1], expected[5])
    assert np.isnan(made["extra_static"][1, 0]).all() and np.isfinite(expected).all()


def _model(method: str):
    model = tiny_model(method, modalities=loading.load("static"))
    extra = {"static": np.zeros((1, 10), np.float32)}
    made = variable_shapes(model, extra)
    rng = np.random.default_rng(0)
    plain = random_variables(tiny_model(method))
    drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), made["params"])
    return model, {**plain, "params": drawn}


def _values(rows: int = 4) -> np.ndarray:
    values = np.random.default_rng(3).normal(size=(rows, 10)).astype(np.float32)
    values[1] = np.nan
    return values


@pytest.mark.parametrize("method", _METHODS)
def test_a_static_token_changes_only_its_row_and_a_missing_one_changes_nothing(method):
    model, variables = _model(method)
    run = jax.jit(lambda values: model.apply(variables, **batch(), extra={"static": values})["logits"])
    base = run(_values())
    changed, removed, nothing = _values(), _values(), np.full((4, 10), np.nan, np.float32)
    changed[2] += 1
    removed[2] = np.nan
    for values in (changed, removed):
        moved_B = np.abs(run(values) - base).max(1)
        assert moved_B[2] > 1e-4 and moved_B[[0, 1, 3]].max() == 0
    assert np.abs(run(nothing) - base)[[0, 2, 3]].max(1).min() > 1e-4
    if method == "medfuse":  # attention has weights of its own for each modality
        without = {name: x for name, x in variables["params"].items() if name != "static_encoder"}
        alone = tiny_model(method).apply({**variables, "params": without}, **batch())["logits"]
        np.testing.assert_allclose(run(nothing), alone, atol=1e-5)


@pytest.mark.parametrize("method", _METHODS)
def test_rows_without_a_value_give_the_encoder_no_gradient(method):
    model, variables = _model(method)

    @jax.jit
    def gradient(values):
        def loss(params, values):
            out = model.apply({**variables, "params": params}, **batch(), extra={"static": values})
            return jnp.sum(jnp.sin(out["logits"]))

        return jax.grad(loss, argnums=(0, 1))(variables["params"], values)

    some, of_values = gradient(_values())
    none, _ = gradient(np.full((4, 10), np.nan, np.float32))
    largest = lambda tree: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert largest(none["static_encoder"]) == 0 < largest(some["static_encoder"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((some, none)))
    np.testing.assert_array_equal(np.any(np.asarray(of_values), axis=1), [True, False, True, True])


class _Direction(nn.Module):
    """An encoder whose gradient at zeros is 0 / 0."""

    width: int

    @nn.compact
    def __call__(self, values_BV):
        x_BH = nn.Dense(8, use_bias=False)(values_BV)
        return nn.Dense(self.width)(x_BH / jnp.linalg.norm(x_BH, axis=-1, keepdims=True))


@pytest.mark.parametrize("absent", [[1], [0, 3], [0, 1, 2, 3]])
def test_an_encoder_with_nan_gradients_at_zero_is_not_applied_to_absent_rows(absent):
    model = tiny_model("medfuse", modalities=(loading.Modality("direction", None, _Direction),))
    made = jax.eval_shape(
        lambda: init_variables(model, jax.random.key(0), {"direction": np.zeros((1, 10), np.float32)})
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), made["params"])
    stats = random_variables(tiny_model("medfuse"))["batch_stats"]
    values = rng.normal(size=(4, 10)).astype(np.float32)
    values[absent] = np.nan

    def loss(params, values):
        outputs = model.apply({"params": params, "batch_stats": stats}, **batch(), extra={"direction": values})
        return jnp.sum(jnp.sin(outputs["logits"]))

    of_params, of_values = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, values)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((of_params, of_values)))
    assert np.any(np.asarray(of_values), axis=1).tolist() == [row not in absent for row in range(4)]


def test_a_slot_unused_in_training_contributes_nothing():
    values = np.zeros((3, 10), np.float32)
    values[0, 4] = values[1, 9] = 1
    encoder = static.Encoder(6)
    tokens = encoder.apply(encoder.init(jax.random.key(0), values), values)
    np.testing.assert_array_equal(tokens, np.zeros((3, 6)))


@pytest.mark.parametrize("method", _METHODS)
def test_the_static_encoder_is_one_linear_layer(method):
    model = registry.build(method, 25, modalities=loading.load("static"))
    made = variable_shapes(model, {"static": np.zeros((1, 10), np.float32)})
    assert sum(leaf.size for leaf in jax.tree.leaves(made["params"]["static_encoder"])) == 10 * 256 + 256
    without = shapes(registry.build(method, 25))["params"]
    assert set(made["params"]) - set(without) == {"static_encoder"}


def _train(config, folder):
    run = run_lib.open_run(config)
    workdir.claim(folder, run)
    train.train(run, folder)
    return run


@pytest.mark.slow  # its shorter sibling is in test_attention_weights.py
def test_a_run_with_static_features_trains_evaluates_and_can_be_started_from(tiny_config, tmp_path):
    tiny_config.model.modalities, tiny_config.num_epochs = "static", 1
    run = _train(tiny_config, tmp_path / "a")
    evaluate.evaluate(tmp_path / "a")
    with np.load(tmp_path / "a" / "predictions_test.npz") as stored:
        assert len(stored["stay_id"]) == len(run.dataset.index["test"]["stay_id"])
        assert np.isfinite(stored["scores"]).all()
    source = sources.reopen(tmp_path / "a")
    sources.check(run, "model", tmp_path / "a", source)
    source.dataset.index["train"]["gender"] = np.char.replace(source.dataset.index["train"]["gender"], "F", "W")
    with pytest.raises(UserError, match="its modality 'static' has other values"):
        sources.check(run, "model", tmp_path / "a", source)


def _example() -> str:
    (block,) = re.findall(r"```python\n(\"\"\"notes.py.*?)```", _PAGE.read_text(), re.DOTALL)
    return block


@pytest.fixture
def own(tiny_config, tmp_path, monkeypatch):
    """A config with the page's example, its file and its data in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("notes.py").write_text(_example())
    rng = np.random.default_rng(0)
    stays = [records.index(tiny_config.data.dir, "pheno", split)["stay_id"] for split in ("train", "val", "test")]
    stay_id = np.concatenate(stays)[::2]  # every second stay has notes
    np.savez("notes.npz", stay_id=stay_id, vector=rng.normal(size=(len(stay_id), 5)).astype(np.float32))
    tiny_config.model.modalities = "static,notes.py"
    return tiny_config


def test_the_pages_example_is_short_and_a_gradient_reaches_it(own):
    assert len(_example().splitlines()) < 40
    config_lib.validate(own)
    own.model.resnet_stage_sizes = (1, 1)  # quick to compile, though no config may have it
    run = run_lib.open_run(own)
    state = run.fresh_state()
    made = next(batches.batches(run.dataset, "train", run.train_plan(1)))
    inputs = {name: x[0] for name, x in made.items()}
    has_notes_B = np.isfinite(inputs["extra_notes"]).all(1)
    assert 0 < has_notes_B.sum() < has_notes_B.size
    moved, metrics = jax.jit(lambda s, b: step.train_step(run.options, s, b, jax.random.key(0)))(state, inputs)
    assert np.isfinite(metrics["loss"])
    for name in ("notes_encoder", "static_encoder"):
        change = jax.tree.map(lambda a, b: np.abs(a - b).max(), moved.params[name], state.params[name])
        assert max(jax.tree.leaves(change)) > 0


def test_a_run_is_refused_if_a_modalitys_values_changed_after_training(own, tmp_path):
    workdir.claim(tmp_path / "run", run_lib.open_run(own))
    sources.reopen(tmp_path / "run")
    with np.load("notes.npz") as notes:
        content = dict(notes)
    content["vector"][0] += 1
    np.savez("notes.npz", **content)
    with refused(path=tmp_path / "run" / "data.json"):
        sources.reopen(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "data.json").read_text())["digest"] != records.digest(own.data.dir, "pheno")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("statics", r"'statics'.*Did you mean 'static'"),
        ("static,static", "'static' is taken"),
        ("missing.py", "there is no file missing.py"),
        ("ehr.py", "'ehr' is taken, or no Python name"),
        ("my-notes.py", "'my-notes' is taken, or no Python name"),
        ("empty.py", "empty.py has no table"),
        ("imports.py", r"imports\.py cannot be used \(line 2: ModuleNotFoundError: No module named 'nothing_there'\)"),
        ("unclosed.py", r"unclosed\.py cannot be used \(line 1: SyntaxError: "),
    ],
)
def test_an_invalid_modality_is_refused_in_one_line(tmp_path, monkeypatch, names, message):
    monkeypatch.chdir(tmp_path)
    for name in ("ehr.py", "my-notes.py"):
        Path(name).write_text("def table(part, train): ...\nEncoder = None\n")
    Path("empty.py").write_text("")
    Path("imports.py").write_text("import math\nimport nothing_there\n")
    Path("unclosed.py").write_text("def table(:\n")
    config = config_lib.default()
    config.model.modalities = names
    with pytest.raises(UserError, match=message) as error:
        config_lib.validate(config)
    assert "\n" not in str(error.value)


def test_a_method_without_further_modalities_refuses_one():
    config = config_lib.default()
    config.model.modalities, config.method = "static", "joint"
    with refused(field="config.model.modalities", value="static"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda part, train: np.zeros(4), r"shape \(4,\); it must be \[4, ...\]"),
        (lambda part, train: np.zeros((3, 2)), r"shape \(3, 2\); it must be \[4, ...\]"),
        (lambda part, train: np.array([[0, 0], [0, np.nan], [0, 0], [0, 0]]), "record 1 has some NaN or inf"),
        (lambda part, train: np.array([[0, 0], [0, 0], [0, 0], [0, np.inf]]), "record 3 has some NaN or inf"),
        (lambda part, train: np.full((4, 2), np.nan), "no record has a value"),
        (lambda part, train: [["a"]] * 4, r"'own', train split: it must give rows of numbers.*could not convert"),
        (lambda part, train: [[1], [1, 2], [1], [1]], "it must give rows of numbers, all of one shape"),
    ],
)
def test_a_table_of_the_wrong_form_is_refused(made, message):
    with pytest.raises(UserError, match=message):
        loading.tables(loading.Modality("own", made, static.Encoder), {"train": _TRAIN})


def test_starting_from_a_model_with_its_modalities_in_another_order_is_refused(own, tmp_path):
    """A token's weights depend on its place."""
    run = run_lib.open_run(own)
    own.model.modalities = "notes.py,static"
    with refused(field="config.init.model"):
        sources.check(run, "model", tmp_path, run_lib.open_run(own))


def test_splits_of_different_widths_are_refused():
    val = {name: values[:3] for name, values in _TRAIN.items()}
    wide = loading.Modality("own", lambda part, train: np.zeros((len(part["stay_id"]),) * 2), static.Encoder)
    with pytest.raises(UserError, match=r"'own', val split: a row has shape \[3\], one of the train split \[4\]"):
        loading.tables(wide, {"train": _TRAIN, "val": val})


def test_an_error_in_the_users_table_is_one_line_with_its_place(own):
    Path("notes.npz").unlink()
    line = 1 + next(i for i, text in enumerate(_example().splitlines()) if "np.load" in text)
    with pytest.raises(UserError, match=rf"'notes', train split: notes\.py cannot be used \(line {line}: FileNotFound"):
        run_lib.open_run(own)


def test_a_token_of_the_wrong_width_is_refused_before_the_run_begins(own):
    Path("notes.py").write_text(_example().replace("nn.Dense(self.width)", "nn.Dense(128)"))
    with pytest.raises(UserError, match=r"the Encoder of 'notes' gives \[2, 128\] for 2 rows"):
        run_lib.open_run(own)


_ENCODER = """
import flax.linen as nn
import jax.numpy as jnp
def table(part, train): return [[1.0]] * len(part["stay_id"])
class Encoder(nn.Module):
    width: int
    @nn.compact
    def __call__(self, x): return {returned}
"""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("nn.Dense(self.width + 1)(x)", r"the Encoder of 'mine' gives \[2, 9\] for 2 rows; .* \[2, 8\]"),
        ("nn.Dense(self.width)(x.sum(0, keepdims=True))", r"gives \[1, 8\] for 2 rows"),
        ("(x, x)", "gives tuple for 2 rows"),
        ("nn.Dense(self.width)(x) + jnp.zeros(3)", r"\[2, 1\]: mine\.py cannot be used \(line 8: \w+Error"),
        ("nn.Dropout(0.5, deterministic=False)(nn.Dense(self.width)(x))", "mine.py cannot be used .line 8: InvalidRng"),
        ("nn.BatchNorm(False)(nn.Dense(self.width)(x))", "has variables of the kind batch_stats; parameters alone"),
    ],
)
def test_an_encoder_that_makes_no_token_is_refused_in_one_line(tmp_path, monkeypatch, returned, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(_ENCODER.format(returned=returned))
    (modality,) = loading.load("mine.py")
    with pytest.raises(UserError, match=message) as caught:
        loading.check_encoder(modality, loading.tables(modality, {"train": _TRAIN})["train"], 8)
    assert "\n" not in str(caught.value)


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(KeyError):
        loading.tables(loading.load("static")[0], {"train": {"stay_id": np.arange(3)}})


def test_no_modality_can_read_the_race(shards, tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(
        "from medfuse_jax.data.modalities.static import Encoder\n\n\n"
        "def table(part, train):\n    return (part['race'] == 'White')[:, None]\n"
    )
    (modality,) = loading.load(str(path))
    with pytest.raises(UserError, match="race"):
        open_dataset(shards, "pheno", modalities=(modality,))
