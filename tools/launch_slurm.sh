#!/usr/bin/env bash
# Train on several nodes under SLURM; adapt the lines below, then:
#
#   sbatch tools/launch_slurm.sh --config configs/pile_350m.yaml --config configs/strategy/ddp.yaml
#
# Before its time is up, and when it is preempted, the job gets SIGTERM: the run finishes its step, saves last.ckpt and
# ends with status 143; the job then queues itself again and goes on from there. A node that dies requeues it too.
# data.batch_size is per process: divide it by what you add in processes, or, of a run that begins, accumulate_grad_batches
# and val_check_interval. A run that goes on can change data.batch_size alone.
#SBATCH --job-name=taperlit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
srun --kill-on-bad-exit=1 taperlit fit "$@" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" --ckpt_path last \
    --trainer.plugins '{class_path: lightning.pytorch.plugins.environments.SLURMEnvironment, init_args: {auto_requeue: false}}'
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
