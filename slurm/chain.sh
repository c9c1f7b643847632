#!/bin/bash
# Where jobs may not be requeued: several jobs, each of which goes on where the one before stopped.
#   slurm/chain.sh 5 --nodes=2 slurm/train.sbatch name=a
# When one has ended well, those that follow are cancelled.
set -eu
count=$1
shift
job=$(sbatch --parsable --no-requeue "$@")
echo "$job"
for ((i = 1; i < count; i++)); do
  job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes --dependency="afternotok:$job" "$@")
  echo "$job"
done
