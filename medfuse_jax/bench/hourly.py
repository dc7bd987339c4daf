"""An hourly task: training on all hours of a stay in one pass, against training on its prefixes, one sample an hour.

All train the same stays, an epoch of them; every repeat runs the same few batches of each, whose time is multiplied by
an epoch's batches over theirs. A prefix is read from its start, and encodes the X-ray that it sees. 'prefixes' trains
them with our step, 'torch_prefixes' with that of the tuned PyTorch peer, on the same batches.
"""

import dataclasses

import numpy as np

from medfuse_jax.bench import clock, cohort, flops, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.data.dataset import Dataset


def measure(case: Case, data: Dataset | None = None, say=lambda text, end="": None) -> list[dict]:
    """Return a record for each contender, in seconds an epoch. data: opened shards of decompensation.

    case.peers: () to leave PyTorch out.
    """
    say("reading")
    data = data or cohort.dataset(case)
    hours = data.hours["train"]
    prefixes = cohort.of_stays(hours.steps_S, hours.has_cxr_S, case.method, data.task.name, case.max_buckets)
    samples = {clock.OURS: _sample(case, data), "prefixes": _sample(case, prefixes)}
    trainers = {name: step.Trainer(case, sample, say) for name, sample in samples.items()}
    runs = {name: trainer.run for name, trainer in trainers.items()}
    tuned = dataclasses.replace(case, peers=("torch_tuned",) if case.peers else ())
    for run in step.torch_runs(tuned, samples["prefixes"], say)[0].values():
        runs["torch_prefixes"], samples["torch_prefixes"] = run, samples["prefixes"]
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    for name, sample in samples.items():
        share = len(sample.epoch) / len(sample.plan)
        seconds[name] = [s * share for s in seconds[name]]
    rows, num_stays = clock.records(seconds), len(hours.count_N)
    cxr_flops = flops.training_flops(case.method)["cxr"] if data.use_cxr and not case.sizes else 0.0
    for name, sample in samples.items():
        lengths, num_images = sample.data.lengths("train"), int(sample.data.num_images("train").sum())
        width = trainers[clock.OURS].options.model.ehr_hidden
        total = flops.lstm_flops(int(lengths.sum()), width) + num_images * cxr_flops
        rows[name] |= {
            "scaled_from_batches": len(sample.plan),
            "batches_an_epoch": len(sample.epoch),
            "stays": num_stays,
            "hours": int(hours.count_N.sum()),
            "mean_hours": round(float(np.mean(hours.count_N)), 1),
            "images_an_epoch": num_images,
            "seconds_a_stay": round(rows[name]["seconds"] / num_stays, 6),
            "gflop_a_stay": round(total / num_stays / 1e9, 4),
        }
    for name in samples.keys() - {clock.OURS}:
        rows[name]["flops_over_ours"] = round(rows[name]["gflop_a_stay"] / rows[clock.OURS]["gflop_a_stay"], 2)
    return list(rows.values())


def _sample(case: Case, data: Dataset) -> cohort.Sample:
    """Return batches at quantiles of their longest series: the stays of a small cohort fill fewer than asked for."""
    num_batches = min(case.num_batches, len(cohort.train_plan(case, data)))
    return cohort.sample(dataclasses.replace(case, num_batches=num_batches), data)
