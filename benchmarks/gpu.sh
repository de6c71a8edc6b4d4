#!/usr/bin/env bash
# Every GPU test and benchmark, in steps of under ten minutes; started again, it goes on where it stopped.
#   benchmarks/gpu.sh [FOLDER]      results and logs go to FOLDER (default: benchmarks/results/gpu)
#   DRY_RUN=1 benchmarks/gpu.sh     the same steps on the CPU, cut short: proves the script, measures nothing
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
device=cuda quick=()
if [ "${DRY_RUN:-0}" = 1 ]; then device=cpu quick=(--quick); fi
if [ $device = cuda ]; then python -c "import torch; assert torch.cuda.is_available(), 'no GPU here: DRY_RUN=1 runs the steps on the CPU'"; fi

failed=0
step() {  # NAME COMMAND...: once, within ten minutes
  local name=$1
  shift
  if [ -e "$out/$name.done" ]; then echo "$name: done before"; return; fi
  if timeout 590 "$@" >"$out/$name.log" 2>&1; then
    touch "$out/$name.done"
    echo "$name: done"
  else
    failed=1
    echo "$name: FAILED, see $out/$name.log"
  fi
}

step doctor flywheel-fast doctor
if [ $device = cuda ]; then
  for op in main_estep aux_estep em_step posterior_loss; do
    step "test_$op" pytest tests/test_ops.py -k "cuda and $op"
  done
  step test_rest pytest tests/test_ops.py -k "not oracle"
else
  step test_opcheck pytest tests/test_ops.py -k opcheck
fi
step ops python -m benchmarks.ops --device $device "${quick[@]}"
exit $failed
