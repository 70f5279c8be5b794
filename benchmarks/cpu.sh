#!/usr/bin/env bash
# What docs/performance.md says of CPUs, into FOLDER (docs/performance): about 25 minutes on 2 cores.
#     bash benchmarks/cpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/performance}
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH="$PWD"
mkdir -p "$folder"

"$python" benchmarks/overhead.py --model resnet50 --model cifar_resnet20 --table "$folder/cpu-overhead.md"
for model in cifar_resnet20 resnet18 efficientnet_b0 vit_tiny_patch16_224 resnet50; do
  "$python" benchmarks/speed.py --model "$model" --compile --table "$folder/cpu-$model.md" "$@"
done
