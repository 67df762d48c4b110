#!/usr/bin/env bash
# A run on several machines under Slurm: sbatch --nodes=4 examples/cluster/slurm.sh configs/stages/1-pretrain.yaml [key=value ...]
# Submit it again to go on: it resumes from the last checkpoint, also with another number of nodes.
#SBATCH --job-name=unialign
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM two minutes before the end, to all: the run saves and exits cleanly.
#SBATCH --signal=TERM@120
set -eu

CONFIG=${1:?usage: sbatch examples/cluster/slurm.sh CONFIG.yaml [key=value ...]}
shift
# The run's folder (run.dir) and the sprite pack must lie on storage that all nodes see.
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" \
  --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
  --rdzv-id="$SLURM_JOB_ID" \
  --rdzv-backend=c10d \
  --rdzv-endpoint="$MASTER:29500" \
  --max-restarts=3 \
  -m unialignment.cli train "$CONFIG" "$@"
