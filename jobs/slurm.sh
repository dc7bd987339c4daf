#!/usr/bin/env bash
# Runs a sweep on a Slurm cluster as independent tasks of one GPU each, which share the trials. Adapt the lines with <-.
#   sbatch jobs/slurm.sh --config=configs/pheno.py --config.data.dir=DIR --trials=10 --workdir=DIR
# Tasks may start at different times. After preemption, a node failure or the time limit, Slurm requeues a task, and
# meanwhile the others take over its trials. The workdir must be on a filesystem shared by all nodes.
#SBATCH --job-name=medfuse_sweep
#SBATCH --array=0-7
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
# --requeue covers preemption and failed nodes. Before the time limit, Slurm signals this script, which requeues itself.
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=sweep_%A_%a.log
##SBATCH --partition=gpu        <- your cluster's partition

set -euo pipefail
source "${MEDFUSE_VENV:-$HOME/medfuse_venv}/bin/activate" # <- the environment with '.[gpu]' installed
trap 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' USR1

# Since Slurm 22.05, srun ignores the --cpus-per-task above; without repeating it, the task would have one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m medfuse_jax.sweep "$@" &
step=$!
# The signal interrupts the first wait while the step is still running, hence a second one. If the step has already
# ended, the second wait returns its status at once.
wait "$step" || wait "$step"
