"""Events to time steps, compared with a slow loop and with the released arrays."""

import dataclasses

import numpy as np
import polars as pl
import pytest

from data_prep import build, profiles
from data_prep.ehr import discretize
from data_prep.ehr.arrays import EPSILON_H
from data_prep.ehr.cleaning import VARIABLE
from medfuse_jax import records, schema

HR, EYE = "Heart Rate", "Glascow coma scale eye opening"
HR_CHANNEL = schema.CHANNELS.index(HR)
HR_MASK = schema.CHANNELS.index(f"mask->{HR}")


def _events(*rows):
    """Return events of rows (stay, hour, variable name, value[, text]); each gets its own item."""
    full = [
        (s, round(h * 3600), VARIABLE[v], value, *(text or ("",)), item)
        for item, (s, h, v, value, *text) in enumerate(rows)
    ]
    columns = {"stay": pl.UInt32, "time_s": pl.Int32, "variable": pl.UInt8, "value": pl.Float32, "text": pl.String}
    return pl.DataFrame(full, columns | {"item": pl.Int32}, orient="row")


def _arrays(rows, period_h, timestep_h=1.0, profile="paper", first_stay=0):
    resolved = discretize.resolve_same_time(_events(*rows), profiles.rules(profile))
    return discretize.discretize(resolved, first_stay, np.array(period_h), timestep_h)


@pytest.mark.parametrize(("hour", "step"), [(0, 0), (0.5, 0), (1, 0), (1 + 1 / 3600, 1), (2, 1), (4.5, 4), (4.6, None)])
def test_a_step_includes_its_upper_edge_only(hour, step):
    ehr, length, last = _arrays([(0, hour, HR, 100.0)], [4.5])
    assert length.tolist() == [5] and ehr.shape == (5, 76)
    assert np.flatnonzero(ehr[:, HR_MASK]).tolist() == ([] if step is None else [step])
    assert last.tolist() == [-1 if step is None else round(hour * 3600)]


@pytest.mark.parametrize(
    ("period_h", "timestep_h", "steps"),
    [(48, 1, 48), (48, 2, 24), (48.1, 2, 25), (0.2, 2, 1), (26.832778, 2, 14), (1, 0.3, 4), (1 / 3600, 1e4, 1)],
)
def test_the_number_of_steps(period_h, timestep_h, steps):
    assert discretize.num_steps(np.array([period_h]), timestep_h).tolist() == [steps]


def test_the_last_event_of_a_step_is_carried_forward_within_its_stay():
    rows = [(0, 1.9, HR, 70.0), (0, 1.2, HR, 60.0), (0, 3.5, HR, 90.0), (1, 2.5, HR, 50.0)]
    ehr, length, _ = _arrays(rows, [5.0, 4.0])
    assert length.tolist() == [5, 4]
    assert ehr[:, HR_CHANNEL].tolist() == [86, 70, 70, 90, 90, 86, 86, 50, 50]
    assert ehr[:, HR_MASK].tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0]


def test_variables_have_their_default_before_any_event():
    ehr, _, _ = _arrays([(0, 5.0, HR, 1.0)], [2.0])
    for variable in schema.VARIABLES:
        if variable.classes:
            on = [c for c in variable.classes if ehr[0, schema.CHANNELS.index(f"{variable.name}->{c}")]]
            assert on == [variable.default]
        else:
            assert ehr[0, schema.CHANNELS.index(variable.name)] == np.float32(variable.default)
    assert not ehr[:, 59:].any() and (ehr[:, :59] != 0).any(0).sum() == 17


def test_rows_at_the_same_time():
    def last_class(profile, *texts):
        classes = schema.VARIABLES[VARIABLE[EYE]].classes
        ehr, _, _ = _arrays([(0, 0.5, EYE, float(classes.index(t))) for t in texts], [1.0], profile=profile)
        return next(c for c in classes if ehr[0, schema.CHANNELS.index(f"{EYE}->{c}")])

    texts = [(0, 0.5, HR, 100.0, "100"), (0, 0.5, HR, 99.0, "99"), (0, 0.5, HR, 8.5, "8.5")]
    assert _arrays(texts, [1.0])[0][0, HR_CHANNEL] == pytest.approx(69.16667, rel=1e-6)
    # As text, '99' sorts after '100'.
    assert _arrays(texts, [1.0], profile="released")[0][0, HR_CHANNEL] == 99
    glucose = [(0, 0.5, "Glucose", 100.0), (0, 0.5, "Glucose", 99.0)]
    assert _arrays(glucose, [1.0], profile="released")[0][0, schema.CHANNELS.index("Glucose")] == 100
    assert last_class("paper", "To Speech", "To Pain") == "To Pain"
    assert last_class("released", "To Speech", "To Pain") == "To Speech"
    assert last_class("released", "2 To pain", "Spontaneously", "To Pain") == "To Pain"


def test_an_event_is_never_written_to_another_stay(monkeypatch):
    monkeypatch.setattr(discretize, "num_steps", lambda period_h, timestep_h: np.array([3, 0, 3]))
    with pytest.raises(AssertionError):
        _arrays([(0, 1.5, HR, 61.0), (1, 0, HR, 199.0)], [3.0, 1e-9, 3.0])


def test_duplicates_count_once():
    once = _events((0, 0.5, HR, 80.0), (0, 0.5, HR, 90.0), (0, 0.5, EYE, 1.0), (0, 0.5, EYE, 3.0))
    resolved = discretize.resolve_same_time(once, profiles.PAPER)
    assert sorted(resolved["value"].to_list()) == [3, 85] and resolved["rows"].to_list() == [2, 2]
    for row in range(4):
        assert discretize.resolve_same_time(pl.concat([once, once[row]]), profiles.PAPER).equals(resolved)
    other_item = once[1].with_columns(item=pl.lit(99, pl.Int32))
    assert sorted(discretize.resolve_same_time(pl.concat([once, other_item]), profiles.PAPER)["value"])[1] > 86


def _slow(rows, period_h, timestep_h):
    """Discretise one stay by a plain loop over its events, sorted by time."""
    steps = int(period_h / timestep_h + 1 - EPSILON_H)
    current = {v.name: (v.classes.index(v.default) if v.classes else v.default) for v in schema.VARIABLES}
    out = np.zeros((steps, 76), np.float32)
    for step in range(steps):
        for h, name, value in rows:
            if -EPSILON_H < h < period_h + EPSILON_H and int(h / timestep_h - EPSILON_H) == step:
                current[name] = value
                out[step, schema.CHANNELS.index(f"mask->{name}")] = 1
        for variable in schema.VARIABLES:
            if variable.classes:
                text = variable.classes[int(current[variable.name])]
                out[step, schema.CHANNELS.index(f"{variable.name}->{text}")] = 1
            else:
                out[step, schema.CHANNELS.index(variable.name)] = current[variable.name]
    return out


@pytest.mark.parametrize("timestep_h", [1.0, 2.0, 0.7])
def test_many_stays_at_once_equal_a_loop_over_events(timestep_h):
    rng = np.random.default_rng(0)
    period_h = rng.uniform(0.2, 60, 12)
    rows = []
    for stay in range(12):
        for seconds in np.unique(rng.integers(0, 70 * 3600, rng.integers(1, 80))).tolist():
            variable = schema.VARIABLES[rng.integers(17)]
            value = rng.integers(len(variable.classes)) if variable.classes else np.float32(rng.normal(50, 20))
            rows.append((stay + 7, seconds / 3600, variable.name, float(value)))
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    ehr, length, _ = _arrays(shuffled, period_h, timestep_h, first_stay=7)
    slow = [_slow([r[1:] for r in rows if r[0] == stay + 7], period_h[stay], timestep_h) for stay in range(12)]
    assert length.tolist() == [len(s) for s in slow]
    np.testing.assert_array_equal(ehr, np.concatenate(slow))


def test_events_after_the_period_change_nothing():
    rows = [(0, 10.0, HR, 70.0), (0, 47.0, HR, 80.0)]
    before = _arrays(rows, [48.0])[0]
    later = _arrays([*rows, (0, 48.5, HR, 10.0), (0, 60.0, EYE, 1.0)], [48.0])[0]
    inside = _arrays([*rows, (0, 47.5, HR, 10.0)], [48.0])[0]
    np.testing.assert_array_equal(before, later)
    assert (before != inside).any()


def _read(out, task):
    return {r["stay_id"]: r for split in schema.SPLITS for r in records.open_split(out, task, split)}


@pytest.fixture(scope="module")
def released(real_data, tmp_path_factory):
    """The demo built by the profile `released`, 1 h and 2 h: {(task, hours): {stay_id: record}}."""
    out = tmp_path_factory.mktemp("released")
    built = {}
    for hours in (1, 2):
        build.build(
            real_data / "mimic-iv-demo-2.2",
            None,
            out,
            profile="released",
            timestep_h=hours,
            tasks=("pheno", "mortality"),
            phenotypes=real_data / "released/icd_9_10_definitions_2.yaml",
        )
        built |= {(task, hours): _read(out, task) for task in ("pheno", "mortality")}
    return built


def _differences(real_data, built):
    """Return the names of the released arrays and labels that `built` does not equal, and how many were compared."""
    differing, compared = [], 0
    with np.load(real_data / "pipeline_gold/released_demo_subset.npz") as gold:
        for name in gold:
            task, stay_id, what = name.split("/")
            for hours in (1, 2):
                record = built[task, hours][int(stay_id)]
                if what == "label":
                    same = np.array_equal(record["label"], gold[name])
                elif what == f"{hours}h":
                    same = record["ehr"].shape == gold[name].shape and np.abs(record["ehr"] - gold[name]).max() <= 1e-5
                else:
                    continue
                compared += 1
                differing += [] if same else [f"{name} at {hours} h"]
    return differing, compared


def test_the_profile_released_reproduces_the_released_arrays_and_labels(real_data, released):
    assert _differences(real_data, released) == ([], 100)
    stays = {"pheno": 112, "mortality": 54}
    assert {key: len(rows) for key, rows in released.items()} == {
        (task, hours): stays[task] for task in stays for hours in (1, 2)
    }


@pytest.mark.parametrize("wrong", [{"same_time": "mean"}, {"none_is_class": False}])
def test_a_wrong_rule_does_not_reproduce_the_released_arrays(real_data, released, tmp_path, monkeypatch, wrong):
    monkeypatch.setitem(profiles.PROFILES, "released", dataclasses.replace(profiles.RELEASED, **wrong))
    build.build(real_data / "mimic-iv-demo-2.2", None, tmp_path, profile="released", timestep_h=1, tasks=("mortality",))
    differing, _ = _differences(real_data, released | {("mortality", 1): _read(tmp_path, "mortality")})
    assert differing and all(name.startswith("mortality") for name in differing)
