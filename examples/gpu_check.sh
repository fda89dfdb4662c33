#!/usr/bin/env bash
# Runs on one GPU, in under 8 minutes, what a machine without one cannot: the tests marked `gpu` (every method eager
# and compiled, in bfloat16 and float16; OCL at 9,600 pictures; k-NN; from JPEG files to features) and the speed and
# memory of a training step, and writes one report.
#
#     examples/gpu_check.sh [REPORT]        REPORT: gpu_check.md by default
#
# Exit status: that of the tests; 3 where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
report=${1:-gpu_check.md}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}

device=$(python -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')") || exit 1
if [ -z "$device" ]; then
    echo "gpu_check.sh: torch finds no CUDA device here, so nothing was run and no report written." >&2
    exit 3
fi
{
    echo "# $device, $(date -u +%F)"
    echo
    echo "Commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(python -c \
        "import torch, transformers; print(f'torch {torch.__version__}, transformers {transformers.__version__}')")."
    echo
    echo '## pytest -m gpu'
    echo '```'
} > "$report"
timeout 310 python -m pytest -m gpu -n 0 -q -rA --tb=short tests/test_gpu.py 2>&1 | tee -a "$report"
status=${PIPESTATUS[0]}
measure() {  # SECONDS, and the words of benchmarks/speed.py
    { echo '```'; echo "## python benchmarks/speed.py ${*:2}"; echo '```'; } >> "$report"
    timeout "$1" python benchmarks/speed.py "${@:2}" 2>&1 | tee -a "$report"
    return "${PIPESTATUS[0]}"
}
speed=0
measure 100 step --preset base --batch_size 128 --precisions bf16 --rounds 3 --steps 5 || speed=$?
measure 60 memory --preset base --batch_size 128 --precisions bf16 --methods pilamim vit_mae || speed=$?
echo '```' >> "$report"
echo "The report is in $report."
exit $((status != 0 ? status : speed))
