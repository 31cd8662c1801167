#!/bin/bash
# ResNet-20 on two nodes under SLURM: sbatch experiments/cluster/slurm.sh [--train.steps 1000 ...]
# The directories must be on a file system that all nodes share. Two minutes before the time limit, or when the job is
# preempted, all processes save at the same step and leave with status 143; the job is put back into the queue and goes
# on from there under the same name.
#SBATCH --job-name=jaxcnn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8  # one process for each GPU, as JAX divides them under SLURM
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun jaxcnn train experiments/resnet20_cifar10.py --run "slurm-$SLURM_JOB_ID" --coordinator auto "$@"
status=$?
if [ "$status" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
