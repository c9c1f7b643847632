#!/bin/bash
# For clusters without requeueing: several jobs, each of which resumes from the previous one.
#   slurm/chain.sh 5 --nodes=2 slurm/train.sbatch name=a
# When one exits with 0, the following jobs are cancelled.
set -eu
count=$1
shift
job=$(sbatch --parsable --no-requeue "$@")
echo "$job"
for ((i = 1; i < count; i++)); do
  job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes --dependency="afternotok:$job" "$@")
  echo "$job"
done
