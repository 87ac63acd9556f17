# shellcheck shell=bash
# Sourced by train.sh and sample.sh: Python's environment, and how a run starts, stops and comes back under SLURM.

# Load MODULES and activate VENV, or CONDA_ENV, where there are any; set PYTHON.
use_environment() {
  local name
  set +u # the scripts of modules, conda and venvs read unset variables
  if type module >/dev/null 2>&1; then
    for name in $MODULES; do module load "$name" || echo "no module $name; going on without" >&2; done
  fi
  if [ -n "$VENV" ]; then
    # shellcheck disable=SC1091
    source "$VENV/bin/activate" || exit 2
  elif [ -z "${VIRTUAL_ENV:-}" ] && command -v conda >/dev/null 2>&1; then
    eval "$(conda shell.bash hook)"
    conda activate "$CONDA_ENV" || echo "no conda environment $CONDA_ENV; going on with $(command -v python)" >&2
  fi
  PYTHON=${PYTHON:-$(command -v python || command -v python3 || echo python)}
  set -u
}

# requeue CODE: put this job back into the queue, unless it was cancelled.
requeue() {
  local id=$SLURM_JOB_ID state
  # The plain number of an array's last task is that of the whole array.
  if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  state=$(squeue --noheader --format=%T --jobs="$id") || state=unknown
  if [ "$state" != RUNNING ]; then
    echo "stopped with code $1; job $id is $state (cancelled?): not requeued" >&2
  elif (trap '' TERM && scontrol requeue "$id"); then # SLURM ends the processes of a requeued job, scontrol itself among them
    echo "stopped with code $1; job $id is back in the queue and will resume" >&2
  else
    echo "stopped with code $1; job $id could not be requeued: submit it again, it will resume" >&2
  fi
}

# run_job SRUN_FLAG SCRIPT [FLAG ...]: run a Python script, in a SLURM job as one step with all its tasks; exit with its code.
run_job() {
  local flag=$1 run='' signalled='' asked='' code=75
  shift
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun does not take it over by itself
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  fi
  # Steps from 4294967290 on are shells: salloc's interactive one, the batch script's.
  if [ -z "${SLURM_JOB_ID:-}" ] || [ "${SLURM_STEP_ID:-4294967295}" -lt 4294967290 ] || ! command -v srun >/dev/null 2>&1; then
    use_environment
    exec "$PYTHON" "$@"
  fi

  # srun passes USR1 on to its tasks; TERM would make it kill them.
  trap 'signalled=1 asked=1; if [ -n "$run" ]; then kill -USR1 "$run" 2>/dev/null || true; fi' USR1 TERM
  use_environment
  if [ -z "$signalled" ]; then
    srun --export=ALL --wait=0 "$flag" "$PYTHON" "$@" &
    run=$!
    signalled=1
    while [ -n "$signalled" ]; do # a signal ends `wait`, not the run
      signalled='' code=0
      wait "$run" || code=$?
    done
  fi
  # 75: saved and stopped; 138: ended by USR1 before Python could listen. Ended by TERM (143), or killed with another task
  # (137): only where this script was signalled, for in that way srun ends the others where one task fails.
  case $code$asked in 75* | 138* | 1431 | 1371) requeue "$code" ;; esac
  exit "$code"
}
