#!/usr/bin/env bash
# The table of docs/coverage_others.md, in an environment of its own: about 10 minutes.
#     bash benchmarks/zoos.sh [FOLDER OF THE ENVIRONMENT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:-.venv-zoos}")
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -c constraints.txt -e '.[timm,transformers,cli]' \
  -r benchmarks/zoo/requirements.txt
"$folder/bin/python" benchmarks/zoo_coverage.py --models 'smp:*' --models 'diffusers:*' \
  --out benchmarks/results/coverage/others.jsonl --table docs/coverage_others.md
