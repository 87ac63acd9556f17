#!/bin/bash
#SBATCH --job-name=diff_go_n_train
#SBATCH --partition=partitions-gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=5
#SBATCH --gres=gpu:1
#SBATCH --mem=64G
#SBATCH --time=72:00:00
#SBATCH --output=%x-%j.out
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=user@email.com

# sbatch train.sh [further flags]      or: DATA_DIR=/data/cityscapes bash train.sh [further flags]
# Change the lines above, and these, for your site. Further flags go to image_train.py and override what stands below.
DATA_DIR=${DATA_DIR:-./datasets/cityscapes}
CHECKPOINT_DIR=${CHECKPOINT_DIR:-./checkpoints/cityscapes}
CONDA_ENV=${CONDA_ENV:-diff_go_n}

set -euo pipefail
# A batch job runs a copy of this file from a spool folder; the project is then where sbatch was called.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -f "$here/image_train.py" ]; then cd "$here"; else cd "$SLURM_SUBMIT_DIR"; fi
if type module >/dev/null 2>&1; then module load cuda || echo "train.sh: no module cuda; going on without" >&2; fi
if command -v conda >/dev/null 2>&1; then
  set +u  # conda's own scripts read unset variables
  eval "$(conda shell.bash hook)"
  conda activate "$CONDA_ENV" || echo "train.sh: no conda environment $CONDA_ENV; going on with $(command -v python)" >&2
  set -u
fi

exec python image_train.py --preset cityscapes --data_dir "$DATA_DIR" --checkpoint_dir "$CHECKPOINT_DIR" \
  --resume_checkpoint auto "$@"
