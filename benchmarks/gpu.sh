#!/usr/bin/env bash
# Everything about speed that only a GPU can show, in 8 minutes at most, into FOLDER (docs/performance):
#     bash benchmarks/gpu.sh [FOLDER]
# Needs the extras timm and cli, pytest, pytest-xdist and hypothesis; nothing is installed or
# downloaded. A part that fails or
# takes too long does not stop the others; what is missing is said at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-docs/performance}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD"
mkdir -p "$folder"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo 'error: torch sees no GPU here; the CPU part is benchmarks/cpu.sh' >&2
  exit 1
}

missing=()
part() { # NAME SECONDS COMMAND...: its log beside the tables
  local name=$1 seconds=$2
  shift 2
  printf '=== %s (at %s s)\n' "$name" "$SECONDS"
  timeout "$seconds" "$@" >"$folder/gpu-$name.log" 2>&1 || missing+=("$name")
  tail -n 40 "$folder/gpu-$name.log"
}

speed() { # NAME SECONDS MODEL OPTIONS...
  local name=$1 seconds=$2 model=$3
  shift 3
  part "$name" "$seconds" "$python" benchmarks/speed.py --model "$model" --amp \
    --table "$folder/gpu-$name.md" "$@"
}

part tests 90 "$python" -m pytest -q -n 0 tests/units/test_engine.py tests/transfer/test_no_sync.py
part overhead 40 "$python" benchmarks/overhead.py --amp --batch-size 128 --table "$folder/gpu-overhead.md"
speed resnet50 120 resnet50 --batch-size 128 --compile
speed resnet18 40 resnet18 --batch-size 256
speed efficientnet_b0 60 efficientnet_b0 --batch-size 128
speed vit_tiny 40 vit_tiny_patch16_224 --batch-size 256
speed cifar_resnet20 30 cifar_resnet20 --batch-size 512

"$python" benchmarks/performance_table.py "$folder"
echo "done in $SECONDS s; parts that failed or were cut off: ${missing[*]:-none}"
test ${#missing[@]} -eq 0
