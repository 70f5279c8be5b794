#!/usr/bin/env bash
# What docs/performance.md says of CPUs, into FOLDER (docs/performance): about 25 minutes on 2 cores.
#     bash benchmarks/cpu.sh [FOLDER [OPTIONS of speed.py]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/performance}
shift || true
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD"
# Freed memory stays with the process, as PyTorch's tuning guide advises for training on CPUs (there
# by another allocator). Else each large result is written to fresh pages, and what is measured is
# how fast the kernel, and the host of a virtual machine, hand those out.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
mkdir -p "$folder"

"$python" benchmarks/overhead.py --model resnet50 --model cifar_resnet20 --table "$folder/cpu-overhead.md"
speed() { # MODEL BATCH OPTIONS...
  "$python" benchmarks/speed.py --model "$1" --batch-size "$2" --table "$folder/cpu-$1.md" "${@:3}"
}
speed cifar_resnet20 128 --compile "$@"
speed resnet18 16 --compile "$@"
speed efficientnet_b0 16 --compile "$@"
speed vit_tiny_patch16_224 16 --compile "$@"
speed resnet50 16 "$@"
"$python" benchmarks/performance_table.py "$folder"
