"""The search space: every host draws the same trials, and invalid parameters are refused."""

from pathlib import Path

import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import search
from medfuse_jax.sweep.trial import Trial

_CONFIG = config_lib.default()


def _draw(*specs, num_trials=10, seed=0):
    return search.draw(search.parse(list(specs), _CONFIG), num_trials, seed)


def _rates(trials):
    return [trial.values["learning_rate"] for trial in trials]


def test_trials_depend_only_on_the_seed_and_their_number():
    ten, three = _draw(search.PAPER_SEARCH), _draw(search.PAPER_SEARCH, num_trials=3)
    assert ten[:3] == three and ten == _draw(search.PAPER_SEARCH) != _draw(search.PAPER_SEARCH, seed=1)
    # Golden: if a version draws other trials, sweeps stopped before cannot be resumed.
    assert _rates(three) == [0.00056929, 0.00058222, 0.00094455]


def test_adding_a_parameter_does_not_change_the_draws_of_another():
    assert _rates(_draw(search.PAPER_SEARCH, "dropout:uniform(0,0.5)")) == _rates(_draw(search.PAPER_SEARCH))


def test_draws_have_the_distribution_of_their_kind():
    trials = _draw("lr:loguniform(1e-5,1e-3)", "dropout:uniform(0.1,0.5)", "seed:int(0,500)", num_trials=300)
    logs = np.log10(_rates(trials))
    assert -5 <= logs.min() < -4.9 and -3.1 < logs.max() <= -3 and abs(logs.mean() + 4) < 0.1
    dropout = np.array([t.values["model.dropout"] for t in trials])
    assert dropout.min() >= 0.1 and dropout.max() <= 0.5 and abs(dropout.mean() - 0.3) < 0.03
    seeds = [t.values["seed"] for t in trials]
    assert all(type(s) is int for s in seeds) and min(seeds) >= 0 and max(seeds) <= 500


def test_all_trials_are_different():
    specs = ["method:choice(mmtm3,mmtm4)", "ehr_only_ratio:choice(0.1,0.2)"]
    assert len({tuple(t.values.items()) for t in _draw(*specs, num_trials=4)}) == 4
    with pytest.raises(UserError) as error:
        _draw(*specs, num_trials=5)
    assert (error.value.field, error.value.value) == ("--trials", 5)


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        ("lr", "lr"),
        ("lr:loguniform(1e-5,1e-3", "lr:loguniform(1e-5,1e-3"),
        ("data.dir:choice(a,b)", "data.dir"),
        ("data.drop_cxr:choice(0.1,0.5)", "data.drop_cxr"),
        ("data.val_stays:choice(partial,paired)", "data.val_stays"),
        ("encoders:choice(pretrained,random)", "encoders"),
        ("eval.batch_size:choice(16,64)", "eval.batch_size"),
        ("placement:choice(stream,device)", "placement"),
        ("profile_steps:choice(1:2,3:4)", "profile_steps"),
        ("seed:int(0,99999999999999999999)", (0, 99999999999999999999)),
        ("lr:loguniform(1e-3,1e-5)", (1e-3, 1e-5)),
        ("lr:uniform(1,1)", (1, 1)),
        ("lr:loguniform(0,1)", (0, 1)),
        ("lr:uniform(1)", ["1"]),
        ("lr:uniform(nan,1)", "nan"),
        ("lr:uniform(__import__('os').getpid(),1)", "__import__('os').getpid()"),
        ("seed:uniform(0,1)", "uniform"),
        ("lr:int(1,3)", "int"),
        ("image.flip:uniform(0,1)", "uniform"),
        ("method:choice()", ""),
        ("seed:choice(1.5)", "1.5"),
    ],
)
def test_invalid_specs_are_refused(spec, value):
    with pytest.raises(UserError) as error:
        search.parse([spec], _CONFIG)
    assert (error.value.field, error.value.value) == ("--search", value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "value", "nearest"),
    [
        ("lr:lognormal(1,2)", "lognormal", "loguniform"),
        ("learning_rat:uniform(0,1)", "learning_rat", "learning_rate"),
        ("droput:uniform(0,1)", "droput", "dropout"),
        ("image.flip:choice(yes)", "yes", ""),
    ],
)
def test_misspelt_names_are_refused_with_the_nearest(spec, value, nearest):
    with pytest.raises(UserError) as error:
        search.parse([spec], _CONFIG)
    assert (error.value.value, error.value.nearest) == (value, nearest)


def test_the_widest_range_of_an_int_can_be_drawn():
    (trial,) = _draw(f"seed:int({-(2**63 - 1)},{2**63 - 1})", num_trials=1)
    assert abs(trial.values["seed"]) > 2**40


def test_a_parameter_named_twice_is_refused():
    with pytest.raises(UserError) as error:
        search.parse(["lr:uniform(0,1)", "learning_rate:uniform(0,1)"], _CONFIG)
    assert (error.value.field, error.value.value) == ("--search", "learning_rate")


def test_a_trial_leaves_the_config_of_the_sweep_unchanged():
    trial = Trial(0, {"learning_rate": 0.5, "image.flip": False, "method": "mmtm3"})
    config = trial.config(_CONFIG)
    assert (config.learning_rate, config.image.flip, config.method) == (0.5, False, "mmtm3")
    assert (_CONFIG.learning_rate, _CONFIG.image.flip, _CONFIG.method) == (1e-4, True, "medfuse")
    assert trial.describe() == "lr 0.5, image.flip False, method mmtm3"


def _config_file(tmp_path, body) -> Path:
    path = tmp_path / "config.py"
    path.write_text(f"{body}\n")
    return path


def _collect(tmp_path, body, num_trials=None):
    return search.collect(search.sweep_function(_config_file(tmp_path, body)), _CONFIG, num_trials)


def test_a_config_can_list_its_trials(tmp_path):
    body = "def sweep(add):\n    for lr in (1e-4, 1e-3):\n        add(lr=lr, seed=3)"
    trials = _collect(tmp_path, body)
    assert [t.values for t in trials] == [{"learning_rate": 1e-4, "seed": 3}, {"learning_rate": 1e-3, "seed": 3}]
    assert _collect(tmp_path, body, 1) == trials[:1]
    with pytest.raises(UserError) as error:
        _collect(tmp_path, body, 3)
    assert (error.value.field, error.value.value) == ("--trials", 3)
    assert search.sweep_function(_config_file(tmp_path, "")) is None


def test_a_value_of_the_wrong_type_is_refused():
    with pytest.raises(UserError) as error:
        Trial(0, {"learning_rate": "x"}).config(_CONFIG)
    assert (error.value.field, error.value.value) == ("config.learning_rate", "x")


def test_numpy_numbers_become_python_numbers(tmp_path):
    body = "import numpy as np\ndef sweep(add):\n    add(lr=np.float64(1e-4), seed=np.arange(4)[3])"
    (trial,) = _collect(tmp_path, body)
    assert trial.values == {"learning_rate": 1e-4, "seed": 3} and type(trial.values["seed"]) is int
    config_lib.validate(trial.config(_CONFIG))


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("def sweep(add):\n    pass", 0),
        ("def sweep():\n    pass", None),
        ("sweep = 3", None),
        ("def sweep(add):\n    add(1e-3)", 1e-3),
        ("def sweep(add):\n    add(lr=1e-3, learning_rate=1e-4)", "learning_rate"),
        ("def sweep(add):\n    add(lr=1e-3)\n    add(lr=1e-3)", {"learning_rate": 1e-3}),
        ("def sweep(add):\n    add(learning_rat=1)", "learning_rat"),
        ("def sweep(add):\n    add(encoders='random')", "encoders"),
    ],
)
def test_invalid_lists_of_trials_are_refused(tmp_path, body, value):
    with pytest.raises(UserError) as error:
        _collect(tmp_path, body)
    assert error.value.value == value and "sweep" in error.value.field


def test_an_error_in_the_list_names_its_line(tmp_path):
    with pytest.raises(UserError, match="line 2: TypeError: 'float' object is not iterable"):
        _collect(tmp_path, "def sweep(add):\n    for lr in 1e-4:\n        add(lr=lr)")
