#!/usr/bin/env bash
# The four phases on SLURM, on the number of nodes given by --nodes, requeued automatically when preempted.
#
#   sbatch examples/launch/slurm.sh                       # microdit-xl
#   sbatch examples/launch/slurm.sh microdit-tiny --price-per-hour 2.5
#
# The project folder, data/ and runs/ must be on a file system that all nodes share.
#SBATCH --job-name=microdit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=microdit-%j.log
#SBATCH --signal=TERM@120
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"

recipe=${1:-microdit-xl}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One torchrun per node, with the rendezvous on the first. --resume continues from the newest complete checkpoint, or starts from scratch.
# SLURM sends SIGTERM two minutes before it takes the nodes away: every process then finishes its step and saves.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for each restart, without addresses of dead processes
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m microdit train "$recipe" --resume "${@:2}"
code=$?

# Anything but success means that there is work left, so requeue the job, which then continues. An error in the recipe would fail every time,
# so give up after 20 restarts.
if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
