#!/usr/bin/env bash
# All of docs/paper.md that takes two CPU cores minutes, in about two hours; what is finished is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
paper() { .venv/bin/python examples/paper/paper.py "$@"; }

make install
paper figure1
paper figure1 --study
paper figure2
paper study bessel
paper table1 mnist
paper study mnist
paper table1 resnet20 --quick
paper precision --quick
cp runs/paper/*.json examples/paper/results/
paper document
