"""The steps of a sweep: many trials on the same batches, beside the same trials as runs alone. Compute only.

How many trials a call computes together is measured first, as a sweep does at its start.
"""

import jax

from medfuse_jax.bench import clock, cohort, step
from medfuse_jax.bench.cases import Case
from medfuse_jax.sweep import lanes as lanes_lib
from medfuse_jax.sweep import stacked_step


def measure(case: Case, data=None, say=lambda text: None) -> list[dict]:
    """One record a contender: a pass of all trials side by side, one after another as runs alone, and of one run."""
    data = data or cohort.dataset(case)
    plan = cohort.sample(cohort.train_plan(case, data), data.lengths("train"), case.num_batches)
    batches = cohort.collate_all(data, plan, num_devices=1)
    alone, together = step.Trainer(case, data, batches, say), Trials(case, data, batches, say)

    def runs_alone() -> None:
        for _ in range(case.num_trials):
            alone.run()

    runs = {step.OURS: together.run, "runs_alone": runs_alone, "one_run": alone.run}
    seconds = clock.interleave(runs, case.warm_up, case.repeats, say)
    rows = {name: clock.summary(taken) | step.counts(plan, batches) for name, taken in seconds.items()}
    rows[step.OURS] |= {
        "num_trials": case.num_trials,
        "lanes": together.lanes,
        "lanes_step_s": together.lanes_step_s,
    }
    for name in ("runs_alone", "one_run"):
        rows[name]["time_over_ours"] = clock.ratio(seconds[name], seconds[step.OURS])
    return [{"contender": name} | row for name, row in rows.items()]


class Trials:
    """The trials of a case, that go on from repeat to repeat as in a sweep."""

    def __init__(self, case: Case, data, batches: list[dict], say):
        self._on = jax.local_devices()[:1]
        options = step.step_options(case, data)
        self._batches = [jax.tree.map(lambda x: jax.device_put(x, self._on[0]), batch) for batch in batches]
        self._train_fn = stacked_step.compile_train(options, self._on)
        say("trials: initialising")
        state = jax.device_get(step.fresh_state(options))

        def stack_with(lanes: int) -> list[stacked_step.Stack]:
            n = case.num_trials
            dropouts = [options.model.dropout] * n
            return stacked_step.stack([state] * n, list(range(n)), dropouts, lanes, self._on)

        say("trials: measuring how many at once")
        # On the longest batch, which decides what fits.
        longest = max(self._batches, key=lambda batch: batch["ehr"].shape[2] if "ehr" in batch else 0)
        times_s = lanes_lib.measure(self._train_fn, stack_with, case.num_trials, longest, self._on)
        self.lanes = min(times_s, key=times_s.get)
        self.lanes_step_s = {str(lanes): round(step_s, 6) for lanes, step_s in times_s.items()}
        self._stacks = stack_with(self.lanes)

    def run(self) -> None:
        """One pass of every trial over the batches."""
        for batch in self._batches:
            losses = stacked_step.train_all(self._train_fn, self._stacks, batch, self._on)
        jax.block_until_ready((losses, [one.state for one in self._stacks]))
