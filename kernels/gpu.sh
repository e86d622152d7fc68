#!/usr/bin/env bash
# All that needs a GPU, into one folder: bash kernels/gpu.sh [FOLDER], from the top of the repository.
# Tests, benchmark of the layer (launched and as CUDA graphs) and of whole steps, other tile sizes, counters where ncu may be used.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-results/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"

nvidia-smi >"$out/device.txt" 2>&1
"$python" -m pytest -q tests/test_kernels.py tests/test_kernels_triton.py 2>&1 | tee "$out/tests.txt"
status=$?

"$python" -m kernels.bench --device cuda --out "$out" 2>&1 | tee "$out/bench.txt" || status=1
"$python" -m kernels.bench --device cuda --graph --no-compile --out "$out" 2>&1 |
    tee "$out/bench_graph.txt" || status=1

# Whole training steps, and several runs at once.
"$python" -m pytest -q tests/test_train.py 2>&1 | tee "$out/tests_train.txt"
"$python" -m kernels.bench --step --replicas 1 2 4 8 --out "$out" 2>&1 | tee "$out/step.txt" || status=1

# One constant at a time, on the shape the targets are set for.
for setting in _BLOCK=512 _BLOCK=2048 _BLOCK=4096 _PROGRAMS=1024 _PROGRAMS=4096 _MAX_IMAGES=16 \
    _MAX_IMAGES=64 _BACKWARD_TILE=1024 _BACKWARD_TILE=4096 _PIXELS=32 _PIXELS=128 _CHANNELS=32; do
    "$python" -m kernels.bench --device cuda --no-compile --shapes paper-256 --seconds 0.1 \
        --set "$setting" --out "$out/$setting" 2>&1 | grep -E 'triton|WRONG|;' |
        sed "s/^/$setting /"
done | tee "$out/sweep.txt"

if command -v ncu >/dev/null; then
    ncu --kernel-name 'regex:_(prepare|forward|backward|backward_last|finish)_kernel' \
        --launch-skip 20 --launch-count 16 --section SpeedOfLight --section Occupancy \
        --section MemoryWorkloadAnalysis \
        "$python" -m kernels.bench --device cuda --no-compile --shapes paper-256 --seconds 0.01 \
        --out "$out/ncu" >"$out/ncu.txt" 2>&1 || echo "ncu did not work: see $out/ncu.txt"
fi
exit $status
