"""The steps of a sweep: many trials on the same batches, compared with as many single runs. Compute only.

The number of trials to compute together in one call is measured first, as at the start of a sweep.
"""

import jax

from medfuse_jax.bench import clock, cohort, roofline, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep import stacked_step


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """Return the records of one pass over the batches: by all trials ('ours'), as many single runs, and one run."""
    sample = cohort.sample(case, data)
    one_run, trials = step.Trainer(case, sample, say), Trials(case, sample, say)
    alone = {"one_run": one_run.run}

    def runs_alone() -> None:
        for _ in range(case.num_trials):
            one_run.run()

    if not case.lanes:
        alone = {"runs_alone": runs_alone} | alone
    runs = {clock.OURS: trials.run} | alone
    rows, counts = clock.records(clock.interleave(runs, case.warm_up, case.repeats, say)), sample.counts()
    rows[clock.OURS] |= {"num_trials": case.num_trials, "lanes": trials.lanes, "lanes_step_s": trials.lanes_step_s}
    rows[clock.OURS] |= _rates(case, one_run, counts, rows[clock.OURS]["seconds"])
    return [row | counts for row in rows.values()]


def _rates(case: Case, one_run: step.Trainer, counts: dict, seconds: float) -> dict:
    """Return the rates of all trials together; their operations are those of as many runs."""
    of_one = one_run.work(seconds)
    flops = of_one["tflop_per_repeat_device"]
    row = roofline.shares(flops and case.num_trials * flops * 1e12, None, seconds, case.precision)
    return row | {
        "samples_per_s": round(case.num_trials * counts["samples_per_repeat"] / seconds, 2),
        "images_per_s_device": round(case.num_trials * counts["images_per_repeat"] / seconds, 2),
        "recurrence": of_one["recurrence"],
    }


class Trials:
    """The trials of a case. Each repeat continues from the states of the last."""

    def __init__(self, case: Case, sample: cohort.Sample, say):
        self._on = [jax.local_devices()[:1]]
        options = step.step_options(case, sample.data)
        self._batches = jax.device_put(sample.batches, self._on[0][0])
        self._train_fn = stacked_step.compile_train(options, self._on)
        say("trials: initialising")
        state = jax.device_get(step.fresh_state(options))

        def stack_with(lanes: int) -> list[stacked_step.Stack]:
            n = case.num_trials
            return stacked_step.stack([state] * n, list(range(n)), [options.model.dropout] * n, lanes, self._on)

        if case.lanes:
            self.lanes, self.lanes_step_s = min(case.lanes, case.num_trials), {}
            self._stacks = stack_with(self.lanes)
            return
        say("trials: measuring how many to compute together")
        # Measure on the longest batch, which needs the most memory.
        longest = max(self._batches, key=lambda batch: batch["ehr"].shape[2] if "ehr" in batch else 0)

        def seconds_with(lanes: int) -> float:
            return stacked_step.step_s(self._train_fn, stack_with(lanes), longest, self._on)

        times_s = lanes_lib.measure(seconds_with, case.num_trials)
        self.lanes = min(times_s, key=times_s.get)
        self.lanes_step_s = {str(lanes): round(step_s, 6) for lanes, step_s in times_s.items()}
        self._stacks = stack_with(self.lanes)

    def run(self) -> None:
        """Train every trial on every batch once."""
        for batch in self._batches:
            losses = stacked_step.train_all(self._train_fn, self._stacks, batch, self._on)
        jax.block_until_ready((losses, [stack.state for stack in self._stacks]))
