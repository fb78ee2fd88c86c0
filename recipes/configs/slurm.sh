#!/bin/bash
# One training run on several nodes of a SLURM cluster, which is stopped, queued again and goes on until it is done:
#
#     sbatch --nodes 4 recipes/configs/slurm.sh recipes/mae.py --out /shared/runs/mae --data folder:/shared/images --precision bf16
#
# Before its time is up, or when it is preempted, the job gets SIGTERM: the run writes a checkpoint and ends. It is then queued
# again (torchrun gives it half a minute for that), and so it is by SLURM when a node fails. It goes on from its newest checkpoint, also on another number of nodes:
# `scontrol update JobId=ID NumNodes=2` while it waits. /shared is a file system that all nodes see.
#SBATCH --job-name=sslvit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

out=$(printf '%s\n' "$@" | grep -A 1 -x -e --out | tail -n 1)
if [ -z "$out" ]; then
    echo "error: give --out, a folder that all nodes see" >&2
    exit 2
fi
[ -n "$SLURM_CPUS_PER_TASK" ] && export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # which srun does not inherit since 22.05
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
rm -f "$out/ended.json" # of an earlier stop
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv_endpoint "$head:29500" "$@" --resume
status=$?
if [ "$status" -ne 0 ] && grep -q '"state": *"stopped"' "$out/ended.json" 2>/dev/null; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
