"""What a sweep tries: the drawn list is the same everywhere, and what cannot be drawn is one line."""

import re
from pathlib import Path

import numpy as np
import pytest

from medfuse_jax import config as config_lib
from medfuse_jax.runtime.errors import UserError
from medfuse_jax.sweep import search


def _draw(*specs, num_trials=10, seed=0):
    return search.draw(search.parse(list(specs), config_lib.default()), num_trials, seed)


def test_trials_are_a_function_of_seed_and_number():
    ten, three = _draw(search.PAPER_SEARCH), _draw(search.PAPER_SEARCH, num_trials=3)
    assert ten[:3] == three and ten == _draw(search.PAPER_SEARCH) != _draw(search.PAPER_SEARCH, seed=1)
    # Golden: every host and every version draws this list, or stopped sweeps could not go on.
    assert [trial.values["learning_rate"] for trial in three] == [0.00056929, 0.00058222, 0.00094455]


def test_another_parameter_beside_it_changes_no_draw():
    both = _draw(search.PAPER_SEARCH, "dropout:uniform(0,0.5)")
    assert [t.values["learning_rate"] for t in both] == [t.values["learning_rate"] for t in _draw(search.PAPER_SEARCH)]


def test_draws_are_spread_as_their_kind_says():
    trials = _draw("lr:loguniform(1e-5,1e-3)", "dropout:uniform(0.1,0.5)", "seed:int(0,500)", num_trials=300)
    logs = np.log10([t.values["learning_rate"] for t in trials])
    assert -5 <= logs.min() < -4.9 and -3.1 < logs.max() <= -3 and abs(logs.mean() + 4) < 0.1
    dropout = np.array([t.values["model.dropout"] for t in trials])
    assert dropout.min() >= 0.1 and dropout.max() <= 0.5 and abs(dropout.mean() - 0.3) < 0.03
    seeds = [t.values["seed"] for t in trials]
    assert all(type(s) is int for s in seeds) and min(seeds) >= 0 and max(seeds) <= 500


def test_no_two_trials_are_the_same():
    trials = _draw("method:choice(mmtm3,mmtm4)", "ehr_only_ratio:choice(0.1,0.2)", num_trials=4)
    assert len({tuple(t.values.items()) for t in trials}) == 4
    with pytest.raises(UserError, match=r"--trials=5: --search has only 4 different trials"):
        _draw("method:choice(mmtm3,mmtm4)", "ehr_only_ratio:choice(0.1,0.2)", num_trials=5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lr", "is not NAME:KIND(VALUE,...)"),
        ("lr:loguniform(1e-5,1e-3", "is not NAME:KIND(VALUE,...)"),
        ("lr:lognormal(1,2)", "Did you mean 'loguniform'?"),
        ("learning_rat:uniform(0,1)", "Did you mean 'learning_rate'?"),
        ("droput:uniform(0,1)", "Did you mean 'dropout'?"),
        *(
            (f"{field}:choice({values})", f"--search: {field} is not tried, all trials of a sweep share it")
            for field, values in {
                "data.dir": "a,b",
                "data.drop_cxr": "0.1,0.5",
                "data.val_stays": "partial,paired",
                "encoders": "pretrained,random",
                "eval.batch_size": "16,64",
                "placement": "stream,device",
                "profile_steps": "1:2,3:4",
            }.items()
        ),
        ("seed:int(0,99999999999999999999)", "the bounds of an int must lie between -2**63 and 2**63"),
        ("lr:loguniform(1e-3,1e-5)", "the range is upside down or empty (0.001 to 1e-05)"),
        ("lr:uniform(1,1)", "upside down or empty"),
        ("lr:loguniform(0,1)", "starts above 0"),
        ("lr:uniform(1)", "two bounds, low and high, not 1"),
        ("lr:uniform(nan,1)", "'nan' is not a value"),
        ("lr:uniform(__import__('os').getpid(),1)", "is not a value"),
        ("seed:uniform(0,1)", "holds values such as 0, which uniform does not draw: use int"),
        ("lr:int(1,3)", "holds values such as 0.0001, which int does not draw: use uniform"),
        ("method:choice()", "lists no value"),
        ("seed:choice(1.5)", "'1.5' is not a value"),
        ("image.flip:choice(yes)", "must be one of true, false"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(spec, said):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        search.parse([spec], config_lib.default())
    assert "\n" not in str(refused.value)


def test_the_widest_range_of_an_int_is_drawn_from():
    (trial,) = _draw(f"seed:int({-(2**63 - 1)},{2**63 - 1})", num_trials=1)
    assert abs(trial.values["seed"]) > 2**40


def test_a_parameter_named_twice_is_refused():
    with pytest.raises(UserError, match="--search names learning_rate twice"):
        search.parse(["lr:uniform(0,1)", "learning_rate:uniform(0,1)"], config_lib.default())


def test_a_trial_changes_its_config_alone():
    base = config_lib.default()
    trial = search.Trial(0, {"learning_rate": 0.5, "image.flip": False, "method": "mmtm3"})
    config = trial.config(base)
    assert (config.learning_rate, config.image.flip, config.method) == (0.5, False, "mmtm3")
    assert (base.learning_rate, base.image.flip, base.method) == (1e-4, True, "medfuse")
    assert trial.describe() == "lr 0.5, image.flip False, method mmtm3"


def _config_file(tmp_path, body) -> Path:
    path = tmp_path / "config.py"
    path.write_text(f"{body}\n")
    return path


def test_a_config_lists_its_own_trials(tmp_path):
    path = _config_file(tmp_path, "def sweep(add):\n    for lr in (1e-4, 1e-3):\n        add(lr=lr, seed=3)")
    trials = search.collect(search.listed(path), config_lib.default(), None)
    assert [t.values for t in trials] == [{"learning_rate": 1e-4, "seed": 3}, {"learning_rate": 1e-3, "seed": 3}]
    assert len(search.collect(search.listed(path), config_lib.default(), 1)) == 1
    with pytest.raises(UserError, match=r"--trials=3: the config's sweep\(add\) lists only 2"):
        search.collect(search.listed(path), config_lib.default(), 3)
    assert search.listed(_config_file(tmp_path, "")) is None


def test_a_listed_value_of_the_wrong_type_is_said_in_one_line():
    with pytest.raises(UserError, match=r"config\.learning_rate is 'x'; give a value like 0\.0001"):
        search.Trial(0, {"learning_rate": "x"}).config(config_lib.default())


def test_numbers_of_numpy_are_numbers(tmp_path):
    body = "import numpy as np\ndef sweep(add):\n    add(lr=np.float64(1e-4), seed=np.arange(4)[3])"
    (trial,) = search.collect(search.listed(_config_file(tmp_path, body)), config_lib.default(), None)
    assert trial.values == {"learning_rate": 1e-4, "seed": 3} and type(trial.values["seed"]) is int
    config_lib.validate(trial.config(config_lib.default()))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def sweep(add):\n    add(learning_rat=1)", "Did you mean 'learning_rate'?"),
        ("def sweep(add):\n    pass", "adds no trial"),
        ("def sweep():\n    pass", "must take one argument"),
        ("sweep = 3", "must take one argument"),
        ("def sweep(add):\n    add(1e-3)", "calls add(0.001): name the parameter, as add(lr=1e-4)"),
        ("def sweep(add):\n    add(lr=1e-3, learning_rate=1e-4)", "gives one trial learning_rate twice"),
        ("def sweep(add):\n    add(lr=1e-3)\n    add(lr=1e-3)", "adds trial 0 again (lr 0.001)"),
        ("def sweep(add):\n    add(encoders='random')", "the config's sweep(add): encoders is not tried"),
        (
            "def sweep(add):\n    for lr in 1e-4:\n        add(lr=lr)",
            "the config's sweep(add) fails (line 2: TypeError: 'float' object is not iterable)",
        ),
    ],
)
def test_a_list_that_cannot_be_tried_is_refused(tmp_path, body, said):
    with pytest.raises(UserError, match=re.escape(said)):
        search.collect(search.listed(_config_file(tmp_path, body)), config_lib.default(), None)
