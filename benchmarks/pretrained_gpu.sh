#!/usr/bin/env bash
# The recipes of docs/pretrained.md for 30 epochs on a GPU, four side by side; what is done
# already is left out.
#     TRANSFER_SURGERY_DATA=... bash benchmarks/pretrained_gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/pretrained}
export PYTHONPATH="$PWD"
"${PYTHON:-python3}" benchmarks/pretrained.py grid --epochs 30 --folder "$folder" --compiled \
  --cache "${TMPDIR:-/tmp}/matched" | xargs -P4 -I{} sh -c '{}'
"${PYTHON:-python3}" benchmarks/pretrained.py table --folder "$folder"
