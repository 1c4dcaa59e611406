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
export NCCL_IB_HCA=mlx5
ulimit -l unlimited
set -u

# The controller runs on the first node, in the container, which has no srun. So this script starts the processes of all nodes, once the
# controller has written what they need to this pipe.
export MANTA_SLURM_NODES='/shared/my runs/first/slurm'"/nodes-$SLURM_JOB_ID"
rm -f "$MANTA_SLURM_NODES"
mkfifo -m 600 "$MANTA_SLURM_NODES"
while true; do
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --overlap --input=all --kill-on-bad-exit=0 --no-kill --quit-on-interrupt \
        --container-image=/images/manta.sqsh --container-mounts=/shared,/scratch:/tmp \
        /opt/manta/bin/python -P -m manta.cluster.ray.host < "$MANTA_SLURM_NODES"
    sleep 1
done &
nodes=$!
srun --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --overlap \
    --container-image=/images/manta.sqsh --container-mounts=/shared,/scratch:/tmp \
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

pkill -P "$nodes"  # it may wait for the pipe
kill "$nodes"
rm -f "$MANTA_SLURM_NODES"
if [ "$code" = 75 ] && [ "$time_is_up" = yes ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
