#!/usr/bin/env bash
# The table of docs/tools.md, in an environment of its own with all of its tools: about 5 minutes.
#     bash benchmarks/tools.sh [FOLDER OF THE ENVIRONMENT]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:-.venv-tools}")
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet -c constraints.txt -e '.[timm,transformers,onnx]' \
  -r benchmarks/tool_checks/requirements.txt
cd benchmarks
"$folder/bin/python" -m tool_checks --all --page ../docs/tools.md
