#!/bin/bash
#SBATCH --job-name=diff_go_n_sample
#SBATCH --partition=partitions-gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=5
#SBATCH --gres=gpu:1
#SBATCH --mem=32G
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
# %j: also each array task has its own, and keeps it when it is requeued.
#SBATCH --output=logs/%x-%j.out
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=user@email.com

# sbatch sample.sh [further flags]      or: DATA_DIR=/data/cityscapes bash sample.sh [further flags], bash sample.sh --preset toy
# Many GPUs share the pictures: sbatch --nodes=2 --ntasks-per-node=4 --gres=gpu:4 sample.sh, or sbatch --array=0-7 sample.sh.
# For your site change the lines above (flags of sbatch, such as --account, override them) and these (or set them in the
# environment). Further flags go to image_sample.py and override what stands below.
DATA_DIR=${DATA_DIR:-} # these three, where empty: the preset's
MODEL_PATH=${MODEL_PATH:-}
RESULTS_PATH=${RESULTS_PATH:-}
MODULES=${MODULES-cuda}
VENV=${VENV:-} # the folder of a virtual environment; without one, conda's CONDA_ENV where there is conda
CONDA_ENV=${CONDA_ENV:-diff_go_n}

set -euo pipefail
# A batch job runs a copy of this file from a spool folder; the project is then where sbatch was called.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/guided_diffusion/job.sh" ]; then here=${SLURM_SUBMIT_DIR:-$here}; fi
if [ ! -f "$here/guided_diffusion/job.sh" ]; then echo "sample.sh: $here is not the project's folder: call sbatch there" >&2 && exit 2; fi
cd "$here"
source guided_diffusion/job.sh

# Each process has pictures of its own: one that fails leaves the others alone.
run_job --kill-on-bad-exit=0 image_sample.py --preset cityscapes ${DATA_DIR:+--data_dir "$DATA_DIR"} \
  ${MODEL_PATH:+--model_path "$MODEL_PATH"} ${RESULTS_PATH:+--results_path "$RESULTS_PATH"} "$@"
