#!/usr/bin/env bash
# Train on several nodes with torchrun. On every node, with the same first node's name:
#
#   NNODES=4 HEAD=node0 tools/launch_torchrun.sh --config configs/pile_350m.yaml --config configs/strategy/ddp.yaml
#
# NNODES (1): nodes. NPROC (the GPUs here): processes a node. HEAD (this host): the node where the others meet.
# RESTARTS (3): how often the processes are started again, from the last checkpoint, when one fails.
# data.batch_size is per process: divide it by what you add in processes, or, of a run that begins, accumulate_grad_batches
# and val_check_interval. A run that goes on can change data.batch_size alone.
set -euo pipefail
nproc=${NPROC:-$(nvidia-smi -L | wc -l)}
exec torchrun \
    --nnodes "${NNODES:-1}" --nproc-per-node "$nproc" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "${JOB:-taperlit}" --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
    -m taperlit fit "$@" --trainer.num_nodes "${NNODES:-1}" --trainer.devices "$nproc" --ckpt_path last
