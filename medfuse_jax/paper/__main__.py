"""Train what the paper's tables need and make them: `python -m medfuse_jax.paper --data=SHARDS --out=DIR`.

Rerunning the command resumes it, and running it on further hosts shares the trainings. See docs/paper.md.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from medfuse_jax.paper import trainings as trainings_lib
from medfuse_jax.paper.plan import Plan
from medfuse_jax.paper.trainings import Settings, Training
from medfuse_jax.runtime import command_line, files
from medfuse_jax.runtime.errors import UserError, check_choice

if TYPE_CHECKING:
    from medfuse_jax.paper.cells import Table

PRESETS = ("", "smoke")
_PAPER = {"image.crop": "random"}  # beside config.default()
# Everything on the synthetic cohort, with models and images that are too small to learn much.
_SMOKE = {
    "image.crop": "random",
    "image.resize_px": 36,
    "image.crop_px": 32,
    "model.ehr_hidden": 16,
    "model.fusion_hidden": 16,
    "model.resnet_stage_sizes": (1, 1, 1, 1),
    "model.resnet_width": 8,
    "data.max_buckets": 1,
    "num_epochs": 1,
    "eval.num_bootstrap": 200,
}
_SMOKE_STAYS, _SMOKE_CXR_FRACTION, _SMOKE_TRIALS = 400, 0.4, 2


def main(argv: list[str]) -> None:
    # Import late, here and below, so that a wrong flag is refused before jax starts.
    from medfuse_jax.runtime import compilation

    plans = open_plans()
    compilation.configure()
    if flags.FLAGS.preset == "smoke":
        compilation.optimise_little()
    print(describe(plans[0]), flush=True)
    if len(plans) > 1:
        print(f"each {len(plans)} times, for {_repeats(plans)}, in {plans[0].out.parent}")
    if flags.FLAGS.estimate:
        print(_estimate(plans[0], len(plans)), flush=True)
    if flags.FLAGS.dry_run:
        return
    made = [run(plan) for plan in plans]
    if len(plans) > 1:
        _write_repeats(plans, made)


def open_plans() -> list[Plan]:
    """Return the flags' plan for each seed and fold; it alone if there is one seed and no fold."""
    given, plan = flags.FLAGS, open_plan()
    if given.seeds == 1 and not given.folds:
        return [plan]
    from medfuse_jax.sweep import repeats

    if given.imagenet and given.folds:
        message = "--imagenet starts E0 from a workdir of the shards' own splits, which --folds divides anew"
        raise UserError(f"{message}: leave one of them out", field="--folds", value=given.folds)
    if (plan.out / "plan.json").exists():
        raise UserError(f"{plan.out} holds a plan of one seed and no fold: give another --out", field="--out")
    plans = [plan.repeated(repeat) for repeat in repeats.plan(given.seed, given.seeds, given.folds)]
    for task in plan.manifests():
        for one in plans:
            one.indices(task)  # raises UserError if a fold leaves a split empty
    return plans


def _repeats(plans: list[Plan]) -> str:
    given = flags.FLAGS
    folds = f" and {given.folds} folds of the patients" if given.folds else ""
    return f"{given.seeds} seed{'s'[: given.seeds != 1]}{folds}"


def _write_repeats(plans: list[Plan], made: list[list["Table"]]) -> None:
    """Write the mean and spread of every table over the plans, in their common folder."""
    from medfuse_jax.paper import page, repeats

    out, manifests = plans[0].out.parent, plans[0].manifests()
    notices, synthetic = _notices(plans[0], manifests)
    tables = repeats.aggregate(made)
    for table in tables:
        table.notes = [note for note in table.notes if note not in notices]  # which are added again
    notices.append(f"Mean ± standard deviation over {_repeats(plans)}.")
    facts = _facts(plans[0], manifests) | {"repeated": f"{len(plans)} times: {_repeats(plans)}"}
    print(f"\nmean and spread of {len(plans)} repeats: {page.write(out, tables, [], facts, notices, synthetic)}")


def open_plan() -> Plan:
    """Return the plan of the flags. Raise UserError if a flag or a dataset does not fit."""
    from medfuse_jax.runs import workdir

    given = flags.FLAGS
    check_choice("--preset", given.preset, PRESETS)
    is_smoke = given.preset == "smoke"
    fields = dict(_SMOKE if is_smoke else _PAPER) | {"precision": given.precision}
    trials = given.trials or (_SMOKE_TRIALS if is_smoke else 10)
    if given.epochs:
        fields["num_epochs"] = given.epochs
    settings = Settings(given.rates, trials, given.seed, given.search_e3, given.imagenet, fields)
    tasks = trainings_lib.in_order(given.tasks)
    trainings = trainings_lib.plan(tasks, given.methods, settings)
    data_dir = given.data or (_smoke_data(tasks) if is_smoke else "")
    if not data_dir:
        raise UserError("--data is missing: give the folder of the shards that data_prep.build wrote", field="--data")
    settings.fields["data.dir"] = str(Path(data_dir).absolute())
    workdir.check_outside_shards(Path(given.out), data_dir, "--out")
    plan = Plan(Path(given.out), settings.fields["data.dir"], tuple(tasks), settings, trainings)
    _check_data(plan)
    return plan


def _smoke_data(tasks: list[str]) -> str:
    from medfuse_jax.data import synthetic

    return str(synthetic.build(_SMOKE_STAYS, _SMOKE_CXR_FRACTION, sorted({*tasks, "radiology"})))


def _check_data(plan: Plan) -> None:
    """Raise UserError if a dataset is missing, or if they were built by different rules."""
    manifests = plan.manifests()
    for name in ("profile", "timestep_h"):
        values = {task: manifest.get(name) for task, manifest in manifests.items() if task != "radiology"}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{task}: {value}" for task, value in values.items())
            message = f"the datasets in {plan.data_dir} differ in {name} ({found}): build them by one command"
            raise UserError(message, field="--data", path=plan.data_dir, value=values)


def describe(plan: Plan) -> str:
    """Return the plan as text: one line per training."""
    trials = plan.settings.trials
    lines, total = [], 0
    for t in plan.trainings:
        runs = t.num_runs(trials)
        total += runs
        rate = "rate of M9" if t.rate_of else "rates searched" if t.rate is None else f"rate {t.rate:g}"
        starts = f", starts from {' and '.join(t.starts.values())}" if t.starts else ""
        count = f"{runs} training{'s' if runs > 1 else ''}"
        lines.append(f"  {t.task:<9}  {t.id:<15}  {count:<12}  {t.title}: {rate}{starts}")
    return "\n".join([*lines, f"{total} trainings in {plan.out}"])


def _estimate(plan: Plan, times: int) -> str:
    from medfuse_jax.paper import estimate

    def config_of(training: Training):
        return trainings_lib.config_of(training, plan.settings, {}, training.rate)

    of = estimate.estimate(plan.trainings, config_of, plan.settings.trials)
    measured = f"{1000 * of.ehr_s:.0f} ms for the series of a batch and {1000 * of.image_s:.0f} ms for an X-ray"
    return (
        f"one training after another, at most {_duration(times * of.steps_s)} of training steps on this machine "
        f"({measured}, measured here), and about {_duration(times * of.start_s)} to start, compile and score "
        f"{times * len(plan.trainings)} runs and sweeps; early stopping, trials side by side and more devices "
        "shorten it"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def run(plan: Plan) -> list["Table"]:
    """Run every training that is not done, then make the tables and return them.

    Processes that share the folder, on any number of hosts, divide the work by leases. A training that cannot run is
    named in the tables; those that do not need it go on.
    """
    from medfuse_jax.sweep import leases as leases_lib

    _claim(plan)
    failed: dict[tuple[str, str], str] = {}
    waiting = list(plan.trainings)
    with leases_lib.Leases(plan.out / "leases") as leases:
        while waiting:
            ended = [training for training in waiting if _end(plan, training, leases, failed)]
            waiting = [training for training in waiting if training not in ended]
            if waiting and not ended:
                time.sleep(leases_lib.POLL_S)
        with leases.held("tables"):
            return _make_tables(plan, failed)


def _end(plan: Plan, training: Training, leases, failed: dict[tuple[str, str], str]) -> bool:
    """Train a training if it can be trained now; return whether it has ended. failed: (task, id) -> why, added to."""
    key = (training.task, training.id)
    needed = [plan.find(id, training.task) for id in training.needs]
    if broken := [t.id for t in needed if (t.task, t.id) in failed]:
        failed[key] = f"it needs {broken[0]}"
        return True
    if not all(plan.is_done(t) for t in needed):
        return False
    lease = "_".join(key)
    try:
        # Processes join a sweep, but a single training is one process's.
        if not plan.is_done(training) and (training.is_sweep or leases.claim(lease)):
            print(f"\n{training.task} {training.id}: {training.title}", flush=True)
            _train(plan, training)
            with leases.held(f"{lease}_scores"):
                _score(plan, training)
    except UserError as error:
        failed[key] = str(error)
        print(f"{training.task} {training.id} failed, the rest goes on: {error}", flush=True)
    finally:
        leases.release(lease)
    return key in failed or plan.is_done(training)


def _claim(plan: Plan) -> None:
    """Claim the folder for this plan. Raise UserError if it holds another."""
    from medfuse_jax import records

    digests = {task: records.digest(plan.data_dir, task) for task in plan.manifests()}
    content = {
        "trainings": [dataclasses.asdict(t) for t in plan.trainings],
        "settings": dataclasses.asdict(plan.settings),
        "data": digests,
    }
    content = json.loads(json.dumps(content))
    content["settings"]["fields"].pop("data.dir")  # shards may move; their content may not change
    path = plan.out / "plan.json"
    if path.exists():
        stored = files.read_json(path, "give another --out")
        if different := [name for name in content if stored.get(name) != content[name]]:
            message = f"{plan.out} holds another plan (its {different[0]} differ): give another --out"
            raise UserError(message, field="--out", path=path, value=different)
    else:
        if any(plan.out.glob("seed*/plan.json")):
            raise UserError(f"{plan.out} holds plans for seeds or folds: give another --out", field="--out")
        if (plan.out / "config.json").exists() or (plan.out / "sweep.json").exists():
            raise UserError(f"{plan.out} holds a run or a sweep: give another --out", field="--out", path=plan.out)
        with files.must_write(f"--out={plan.out}"):
            plan.out.mkdir(parents=True, exist_ok=True)
            files.write_json(path, content)


def _train(plan: Plan, training: Training) -> None:
    """Train one training: a sweep over learning rates or listed values, or a single run on all devices."""
    from medfuse_jax import main as main_lib
    from medfuse_jax.paper import results
    from medfuse_jax.sweep import command

    starts = {
        name: str(results.chosen_folder(plan.folder_of(plan.find(id, training.task))))
        for name, id in training.starts.items()
    }
    rate = training.rate
    if training.rate_of:
        rate = results.rate_of(plan.folder_of(plan.find(training.rate_of, training.task)))
    config = trainings_lib.config_of(training, plan.settings, starts, rate)
    folder = plan.folder_of(training)
    if not training.is_sweep:
        main_lib.run_all(config, str(folder))
        return
    request = command.Request(
        config,
        config_path=None,
        workdir=folder,
        specs=[],
        num_trials=None if training.values else plan.settings.trials,
        seed=plan.settings.seed,
        lanes=flags.FLAGS.lanes or (1 if flags.FLAGS.preset else None),
        listed=_listed(training) if training.values else None,
        export=range(plan.settings.trials if training.is_chosen_twice else len(training.values)),
    )
    command.run(request, time.perf_counter())


def _score(plan: Plan, training: Training) -> None:
    from medfuse_jax.paper import results

    if not plan.is_done(training):
        results.score(training, plan.folder_of(training))
        files.write_json(plan.folder_of(training) / "done.json", {"trained": training.id})


def _listed(training: Training) -> Callable:
    def sweep(add: Callable) -> None:
        for value in training.values:
            add(**{training.field: value})

    return sweep


def _make_tables(plan: Plan, failed: dict[tuple[str, str], str]) -> list["Table"]:
    from medfuse_jax.paper import contents, page, results
    from medfuse_jax.paper.cells import Maker
    from medfuse_jax.paper.scores import Evaluation

    given, manifests = flags.FLAGS, plan.manifests()
    of_tasks = [
        results.gather(
            task,
            plan.indices(task)["train"],
            list(manifests[task]["labels"]),
            plan.trainings,
            plan.folder_of,
            {id: why for (of, id), why in failed.items() if of in (task, "radiology")},
        )
        for task in plan.tasks
    ]
    bootstrap = plan.settings.fields.get("eval.num_bootstrap", 1000)
    make = Maker(of_tasks, Evaluation(bootstrap, plan.settings.seed, given.resample))
    made, checks = contents.make_all(make, _counts(plan, manifests))
    path = page.write(plan.out, made, checks, _facts(plan, manifests), *_notices(plan, manifests))
    wrong = [check for check in checks if not check.holds]
    print(f"\n{len(made)} tables and figures; {contents.describe_checks(checks)}")
    print(f"written: {path}, {plan.out / 'paper.json'}, {plan.out / 'tables'}")
    if wrong:
        first = wrong[0]
        raise UserError(f"{first.what} differ ({first.a:.6f}, {first.b:.6f}): some result is of older weights")
    return made


def _counts(plan: Plan, manifests: dict[str, dict]) -> dict[str, dict[str, tuple[int, int]]]:
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for task in manifests:
        has_cxr = {split: index["has_cxr"] for split, index in plan.indices(task).items()}
        counts[task] = {split: (len(has_cxr_N), int(has_cxr_N.sum())) for split, has_cxr_N in has_cxr.items()}
    return counts


def _facts(plan: Plan, manifests: dict[str, dict]) -> dict[str, str]:
    first = manifests[plan.tasks[0]]
    runs = sum(t.num_runs(plan.settings.trials) for t in plan.trainings)
    return {
        "trainings": str(runs),
        "learning rates": "searched" if plan.settings.rates == "search" else "of Table A1",
        "epochs, at most": str(plan.settings.fields.get("num_epochs", 50)),
        "precision": plan.settings.fields["precision"],
        "profile of the data": str(first.get("profile")),
        "time step": f"{first.get('timestep_h')} h",
        "E0 starts from": "ImageNet" if plan.settings.imagenet else "random weights",
        "seed": str(plan.settings.seed),
    }


def _notices(plan: Plan, manifests: dict[str, dict]) -> tuple[list[str], bool]:
    """Return the sentences that every table says, and whether the patients are synthetic."""
    notices = []
    if plan.settings.fields["precision"] != "float32":
        notices.append(f"Trained in {plan.settings.fields['precision']}.")
    if any(manifest.get("pairing") == "until_outtime" for manifest in manifests.values()):
        notices.append("Made with X-rays up to the end of the stay (--pairing=until_outtime), for comparison alone.")
    if flags.FLAGS.preset == "smoke":
        notices.append("Tiny models, hardly trained (--preset=smoke): the numbers show that the software works.")
    return notices, any(manifest.get("synthetic") for manifest in manifests.values())


if __name__ == "__main__":
    flags.DEFINE_string("data", "", "Folder of the shards (data_prep.build --out); --preset=smoke makes its own.")
    flags.DEFINE_string("out", None, "Folder for the runs, the tables and the page.", required=True)
    flags.DEFINE_list("tasks", list(trainings_lib.TASKS), "pheno, mortality.")
    flags.DEFINE_list("methods", list(trainings_lib.METHODS), f"Some of {', '.join(trainings_lib.METHODS)}.")
    flags.DEFINE_integer("trials", None, "Learning rates a search; by default 10.", lower_bound=1)
    flags.DEFINE_string("rates", "search", "search, or published: those of Table A1.")
    flags.DEFINE_bool("search_e3", False, "Also search the rate of E3, which the released code gives.")
    flags.DEFINE_string("imagenet", "", "Workdir of imported ImageNet weights for E0 (docs/weights.md).")
    flags.DEFINE_string("precision", "float32", "float32 or bfloat16.")
    flags.DEFINE_string(
        "resample", "", "What the intervals resample: patient or stay; default: see docs/evaluation.md."
    )
    flags.DEFINE_integer("seed", 0, "Of the search and of all trainings.", lower_bound=0)
    flags.DEFINE_integer("seeds", 1, "Repeat everything with so many seeds, from --seed on.", lower_bound=1)
    flags.DEFINE_integer("folds", 0, "Repeat it on so many folds of the patients (docs/sweeps.md).", lower_bound=0)
    flags.DEFINE_integer("epochs", None, "At most so many epochs; by default the paper's 50.", lower_bound=1)
    flags.DEFINE_integer("lanes", None, "Trials per device in one call; by default the fastest.", lower_bound=1)
    flags.DEFINE_string("preset", "", "smoke: everything on a synthetic cohort with tiny models.")
    flags.DEFINE_bool("dry_run", False, "Print the plan and the estimate, and train nothing.")
    flags.DEFINE_bool("estimate", True, "Time a few steps first, for the estimate.")
    command_line.run(main, resumes=True)
