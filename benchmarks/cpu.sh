#!/usr/bin/env bash
# What docs/performance.md says of CPUs, into FOLDER (docs/performance): about 25 minutes on 2 cores.
#     bash benchmarks/cpu.sh [FOLDER [OPTIONS of speed.py]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/performance}
shift || true
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD"
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
