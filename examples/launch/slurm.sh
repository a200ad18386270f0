#!/usr/bin/env bash
# The four phases on SLURM, on as many nodes as --nodes says, started again by itself when it is preempted.
#
#   sbatch examples/launch/slurm.sh                       # microdit-xl
#   sbatch examples/launch/slurm.sh microdit-tiny --price-per-hour 2.5
#
# The folder of the project, data/ and runs/ must lie on a file system that all nodes share.
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

# One torchrun a node; they meet at the first node. --resume goes on from the newest whole checkpoint, or begins.
# SLURM sends SIGTERM two minutes before it takes the nodes away: every process then ends its step and saves.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a new store for each start: no addresses of processes that died
srun --kill-on-bad-exit=1 .venv/bin/torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m microdit train "$recipe" --resume "${@:2}"
code=$?

# Anything but success means that there is work left: once it is queued again it goes on. A mistake in the recipe would fail again
# and again, so give up after some times.
if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
