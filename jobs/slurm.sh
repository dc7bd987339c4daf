#!/usr/bin/env bash
# Runs a sweep on a Slurm cluster: one process a GPU, trials spread over them. Adapt the lines marked with <-.
#   sbatch jobs/slurm.sh --config=configs/pheno.py --config.data.dir=DIR --trials=10 --workdir=DIR
# After preemption, a node failure or the time limit, Slurm requeues the job and it resumes. The workdir must be on a
# filesystem shared by all nodes.
#SBATCH --job-name=medfuse_sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
# Each task sees all GPUs of its node; jax picks the one with the task's local number.
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
# --requeue covers preemption and failed nodes. Before the time limit, Slurm signals this script, which requeues the job.
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=sweep_%j.log
##SBATCH --partition=gpu        <- your cluster's partition

set -euo pipefail
source "${MEDFUSE_VENV:-$HOME/medfuse_venv}/bin/activate" # <- the environment with '.[gpu]' installed
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# jax reads the coordinator and the process numbers from Slurm. Since Slurm 22.05, srun ignores the --cpus-per-task
# above; without repeating it, each task would have one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python -m medfuse_jax.sweep --distributed "$@" &
step=$!
# The signal interrupts the first wait while the step is still running, hence a second one. If the step has already
# ended, the second wait returns its status at once.
wait "$step" || wait "$step"
