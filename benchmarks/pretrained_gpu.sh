#!/usr/bin/env bash
# The recipes of docs/pretrained.md for 30 epochs on a GPU, and the best one of the deeper networks,
# four side by side; what is done already is left out.
#     TRANSFER_SURGERY_DATA=... bash benchmarks/pretrained_gpu.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-benchmarks/results/pretrained}
export PYTHONPATH="$PWD"
study() { "${PYTHON:-python3}" benchmarks/pretrained.py "$@" --folder "$folder"; }
commands() { study grid --epochs 30 "$@" --compiled --cache "${TMPDIR:-/tmp}/matched"; }
{
  commands
  for depth in 32 44 56; do commands --depth $depth --best; done
} | xargs -P4 -I{} sh -c '{}'
study table
