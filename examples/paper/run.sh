#!/usr/bin/env bash
# All of docs/paper.md that fits two CPU cores, in about two hours; what is finished is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
reproduce() { .venv/bin/transfer-surgery reproduce "$@"; }

make install
reproduce figure1
reproduce figure1 --study
reproduce figure2
reproduce study bessel
reproduce table1 mnist
reproduce study mnist
reproduce table1 resnet20 --quick
cp runs/paper/*.json docs/paper/
reproduce document
