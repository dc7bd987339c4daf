#!/usr/bin/env bash
# A sweep on a Slurm cluster: one process a GPU, trials spread over them. Adapt the lines marked with <-.
#   sbatch jobs/slurm.sh --config=configs/pheno.py --config.data.dir=DIR --trials=10 --workdir=DIR
# Preempted, on a node that fails, or at its time limit, the job is queued again and goes on where it was. The workdir
# must be on a filesystem that all nodes see.
#SBATCH --job-name=medfuse_sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
# Each task sees all GPUs of its node: jax takes the one of the task's number there.
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
# --requeue is for preemption and failed nodes. Before the time limit Slurm warns this script, which queues the job.
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=sweep_%j.log
##SBATCH --partition=gpu        <- your cluster's

set -euo pipefail
source "${MEDFUSE_VENV:-$HOME/medfuse_venv}/bin/activate" # <- the environment with '.[gpu]' installed
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1

# jax reads the coordinator, the number of processes and each one's number from Slurm. Since Slurm 22.05 srun no longer
# takes --cpus-per-task from above: without it a task would have one core.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 python -m medfuse_jax.sweep --distributed "$@" &
step=$!
# A signal ends a wait, and the step goes on: so a second wait. The signal is sent once, and if the step ended instead,
# bash still knows how and the second wait says it at once.
wait "$step" || wait "$step"
