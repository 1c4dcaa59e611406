#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=2-8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
#SBATCH --account=research
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --output="/shared/my runs/first/slurm/job-%j.log"
#SBATCH --open-mode=append
#SBATCH --mem=0
#SBATCH --exclude=n7

module load cuda/13.0
set -u

# The controller runs on the first node, and starts the others with srun.
/opt/manta/bin/python -P -m manta.launch train '/shared/my runs/first/slurm/run.yaml' --on allocation &
run=$!

# SLURM signals only this script. The job is requeued if its time is up, but not if it is canceled.
time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    code=$?
done

if [ "$code" = 75 ] && [ "$time_is_up" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
