# Functions for before and after srun, shared by the batch scripts. Source this file.
#
# The trainer writes its exit code to a file, because launchers lose it: torchrun exits with 1 for
# all failures, srun with the highest code of all tasks. 75 means: run the same command again.

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # of an array, requeue this task alone
fi
attempt=$job.${SLURM_RESTART_COUNT:-0}
python=${PERDURE_PYTHON:-python}

# SLURM's commands fail now and then, while its controller or munge is busy: try again.
ask_slurm() { # a command
  local pause
  for pause in 1 2 4 8; do
    "$@" 2>/dev/null && return
    [[ $? != 127 ]] || break # no such command on this node
    sleep "$pause"
  done
  "$@"
}

begin_attempt() {
  local shown end partition grace wait
  rm -f "$SLURM_SUBMIT_DIR/.outcome-$job".*
  export PERDURE_OUTCOME=$SLURM_SUBMIT_DIR/.outcome-$attempt # a folder that all nodes share
  shown=$(ask_slurm scontrol show --oneliner job "$SLURM_JOB_ID")
  end=$(sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' <<<"$shown")
  if end=$(date -d "$end" +%s 2>/dev/null); then
    export PERDURE_END_TIME=$end
  fi
  # A preempted task has the partition's grace time plus the time between TERM and KILL.
  partition=$(ask_slurm scontrol show --oneliner partition "$SLURM_JOB_PARTITION")
  grace=$(sed -n 's/.* GraceTime=\([0-9]*\).*/\1/p' <<<"$partition")
  wait=$(ask_slurm scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  if [[ $partition != *PreemptMode=OFF* && -z ${PERDURE_GRACE_S:-} ]]; then
    export PERDURE_GRACE_S=$((${grace:-0} + ${wait:-30}))
  fi
  echo "--- $attempt on $SLURM_JOB_NODELIST, $(date -Is)"
}

# Exit before the ranks start if the job cannot work. Skipped for requeued jobs.
examine() { # the arguments of the trainer
  [[ ${SLURM_RESTART_COUNT:-0} == 0 && ${PERDURE_DOCTOR:-yes} != no ]] || return 0
  "$python" -m trainer.doctor --quick "$@" || end_attempt $?
}

end_attempt() { # exit code of srun
  local code=$1
  if [[ -s $PERDURE_OUTCOME ]]; then
    code=$(<"$PERDURE_OUTCOME")
    rm -f "$PERDURE_OUTCOME"
  fi
  case $1 in # native code of a rank crashed (128 + ILL, ABRT, BUS, FPE, SEGV); its peers wrote 75
    132 | 134 | 135 | 136 | 139) [[ $code != 75 ]] || code=$1 ;;
  esac
  case $code in # a stop signal before Python had started: 128 + HUP, USR1, USR2, TERM
    129 | 138 | 140 | 143) code=75 ;;
    141) code=75 ;; # 128 + PIPE: SLURM or munge hung up on srun
  esac
  echo "--- $attempt ended with $code, $(date -Is)"
  [[ $code == 75 ]] || exit "$code"
  ask_slurm scontrol requeue "$job"
  case $? in
    0 | 143) sleep 120 ;; # requeueing ends this shell; exiting first would end the job
    *)
      echo "The job cannot be requeued. Submit the same command again to resume, or several jobs at once:"
      echo "  slurm/chain.sh 5 <the arguments of sbatch>"
      ;;
  esac
  exit 75
}
