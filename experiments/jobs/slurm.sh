#!/bin/bash
# A cell an array task. Submit from the repository's folder, on a file system that all nodes share:
#
#     GRID_FILE=my.toml WORKDIR=runs/sweep sbatch --array=0-39%8 --partition=YOURS experiments/jobs/slurm.sh
#     DRY_RUN=1 SLURM_ARRAY_TASK_ID=3 bash experiments/jobs/slurm.sh    # shows the command of cell 3 on any machine
#
# PYTHON is the interpreter that has madjax. A task that is preempted, or reaches its time limit, gives its cell back and
# is queued again; its driver resumes. Afterwards: python -m experiments.sweep --workdir=runs/sweep --collect
#SBATCH --job-name=madjax-sweep
#SBATCH --array=0-3
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@60

command=(
  "${PYTHON:-python}" -m experiments.sweep
  --grid_file="${GRID_FILE:-experiments/jobs/grid.toml}"
  --workdir="${WORKDIR:-runs/sweep}"
)
if [[ -n "${DRY_RUN:-}" ]]; then
  exec "${command[@]}" --dry_run
fi

# srun, because the signals of preemption and of the time limit go to job steps, not to this script
srun "${command[@]}"
status=$?
if [[ $status == 75 ]]; then
  # after a preemption SLURM has queued the task already, and refuses
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit $status
