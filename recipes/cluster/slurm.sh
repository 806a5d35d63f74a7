#!/usr/bin/env bash
# Trains on several machines of a Slurm cluster, a process for each GPU:
#
#     sbatch --nodes 4 --gpus-per-node 8 recipes/cluster/slurm.sh \
#         recipes/ljspeech/waveglow.toml data/lj runs/w
#
# The same command goes on where a job was stopped or lost a machine. All machines see the folders.
#SBATCH --job-name waveflow
#SBATCH --ntasks-per-node 1
#SBATCH --requeue
set -euo pipefail

recipe=$1 data=$2 out=$3
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
again=()
if [ -e "$out/run.json" ]; then again=(--resume); fi

srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m waveflow train "$recipe" --data "$data" --out "$out" --device "${DEVICE:-cuda}" ${again[@]+"${again[@]}"}
