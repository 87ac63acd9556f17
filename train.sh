#!/bin/bash
#SBATCH --job-name=diff_go_n_train
#SBATCH --partition=partitions-gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=5
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
# %j: also each array task has its own, and keeps it when it is requeued.
#SBATCH --output=logs/%x-%j.out
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=user@email.com

# sbatch train.sh [further flags]      or: DATA_DIR=/data/cityscapes bash train.sh [further flags], bash train.sh --preset toy
# Many GPUs: sbatch --nodes=2 --ntasks-per-node=4 --gres=gpu:4 train.sh; --batch_size is per process, and there is one per GPU.
# For your site change the lines above (flags of sbatch, such as --account, override them) and these (or set them in the
# environment). Further flags go to image_train.py and override what stands below.
DATA_DIR=${DATA_DIR:-} # these two, where empty: the preset's
CHECKPOINT_DIR=${CHECKPOINT_DIR:-}
MODULES=${MODULES-cuda}
VENV=${VENV:-} # the folder of a virtual environment; without one, conda's CONDA_ENV where there is conda
CONDA_ENV=${CONDA_ENV:-diff_go_n}

set -euo pipefail
# A batch job runs a copy of this file from a spool folder; the project is then where sbatch was called.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ ! -f "$here/guided_diffusion/job.sh" ]; then here=${SLURM_SUBMIT_DIR:-$here}; fi
if [ ! -f "$here/guided_diffusion/job.sh" ]; then echo "train.sh: $here is not the project's folder: call sbatch there" >&2 && exit 2; fi
cd "$here"
source guided_diffusion/job.sh

# A process that fails or is lost ends the others; one that hangs is noticed after --dist_timeout seconds.
run_job --kill-on-bad-exit=1 image_train.py --preset cityscapes ${DATA_DIR:+--data_dir "$DATA_DIR"} \
  ${CHECKPOINT_DIR:+--checkpoint_dir "$CHECKPOINT_DIR"} --resume_checkpoint auto "$@"
