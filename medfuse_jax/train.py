"""The training loop of one run, read from top to bottom."""

import contextlib
import math
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from medfuse_jax import checkpoints, evaluate, metrics, optim, parallel, starts
from medfuse_jax import experiment as experiment_lib
from medfuse_jax.errors import UserError
from medfuse_jax.runlog import RunLog


def train(
    run: experiment_lib.Experiment,
    workdir: Path,
    encoders: dict[str, tuple[Path, experiment_lib.Experiment]] | None = None,
) -> None:
    """Trains one run to its end, or goes on where a stopped one was.

    Leaves metrics.jsonl, tensorboard/ and checkpoints/ (the best by validation AUROC, and the
    latest) in the workdir. encoders: 'ehr' and 'cxr' -> the finished run to start from.
    Raises UserError where a checkpoint cannot be read or the loss stops being finite.
    """
    with contextlib.closing(checkpoints.open_manager(workdir)) as manager:
        resumed = checkpoints.restore_latest(manager, run.abstract_state())
        if resumed:
            state, progress = resumed
        else:
            state = starts.begin(run.fresh_state(), encoders or {})
            progress = optim.Progress(learning_rate=run.config.learning_rate)
        if not finished(progress, run.config):
            _loop(run, workdir, manager, state, progress)


def _loop(run: experiment_lib.Experiment, workdir: Path, manager, state, progress: optim.Progress) -> None:
    config = run.config
    state = parallel.replicate(state, run.devices)
    train_fn = parallel.compile_train(run.options, config.parallel, run.devices)
    eval_fn = parallel.compile_eval(run.options, config.parallel, run.devices)
    key = jax.random.key(config.seed)
    # Every epoch has as many steps: its batches hold another draw of the same numbers of stays.
    steps_per_epoch = len(run.train_plan(epoch=1))
    step = int(state.step)

    with contextlib.closing(RunLog(workdir, config.name, steps_per_epoch * config.num_epochs, step)) as log:
        while not finished(progress, config):
            epoch = step // steps_per_epoch + 1
            plan = run.train_plan(epoch)
            losses, samples, start_s = [], 0, time.perf_counter()
            for batch in run.batches("train", plan, start=step % steps_per_epoch):
                state, step_metrics = train_fn(state, batch, key)
                losses.append(step_metrics["loss"])
                step += 1
                samples += plan.batch_size
                if len(losses) > 1:  # of the step before, while this one runs
                    loss = check_finite(losses[-2], step - 1, config)
                    log.show(loss=f"{loss:.3f}", rate=f"{samples / (time.perf_counter() - start_s):.0f}/s")
                log.step()
                if (
                    config.checkpoint_every_steps
                    and step % config.checkpoint_every_steps == 0
                    and step % steps_per_epoch
                ):
                    checkpoints.save(manager, state, progress, is_best=False)
            check_finite(losses[-1], step, config)
            train_loss = float(np.mean(jax.device_get(losses)))
            rate = round(samples / (time.perf_counter() - start_s), 2)
            # num_steps: fewer than an epoch's where a stopped run went on within it.
            log.write(
                "train",
                epoch,
                step,
                train_loss=train_loss,
                lr=progress.learning_rate,
                samples_per_s=rate,
                num_steps=len(losses),
            )

            predictions = evaluate.predict(run, eval_fn, state, "val", run.selects("val"))
            val_auroc = metrics.macro(metrics.auroc(predictions.label_NK, predictions.score_NK))
            is_best = progress.update(epoch, predictions.loss, val_auroc, config.plateau_epochs)
            state = state.replace(learning_rate=parallel.replicate(np.float32(progress.learning_rate), run.devices))
            log.write("val", epoch, step, val_loss=predictions.loss, val_auroc=val_auroc)
            checkpoints.save(manager, state, progress, is_best)
            log.show(epoch=f"{epoch}/{config.num_epochs}", AUROC=f"{val_auroc:.3f}")
            log.line(
                f"epoch {epoch}/{config.num_epochs}  loss {train_loss:.4f}  val loss {predictions.loss:.4f}  "
                f"val AUROC {val_auroc:.4f}{' (best)' if is_best else ''}  {rate:.1f} stays/s"
            )
        manager.wait_until_finished()


def finished(progress: optim.Progress, config: ConfigDict) -> bool:
    """Whether a run has come to its last epoch, or is stopped early."""
    return progress.epoch >= config.num_epochs or progress.should_stop(config.early_stop_epochs)


def check_finite(loss: jax.Array, step: int, config: ConfigDict) -> float:
    """The loss of a step as a number; UserError where it is none."""
    loss = float(loss)
    if not math.isfinite(loss):
        raise UserError(
            f"{config.name}: the loss of step {step} is {loss}; try a lower config.learning_rate "
            f"(now {config.learning_rate}) or config.precision=float32"
        )
    return loss
