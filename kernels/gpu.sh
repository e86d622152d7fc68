#!/usr/bin/env bash
# All that needs a GPU, into one folder: bash kernels/gpu.sh [FOLDER [PART ...]], from anywhere.
#   tests    the tests that need a GPU, but for those of the Triton kernels
#   kernels  these: first published models', CUDA graphs and compilers, then hundreds of shapes, each of which is compiled
#   layer    the first layer's benchmark: correct first, then every shape, launched and as CUDA graphs
#   step     whole training steps, rung by rung, and several models at once
#   short    20,000 steps on sprites: precision over 3 seeds, both decoders, FactorVAE; memory and use of the GPU
#   circles  circles-xy at the paper's 500,000 steps, both decoders, SEEDS of each (default 2), then Figure 4
#   sprites  sprites at the paper's 1,500,000 steps, likewise, with shuffled coordinates, then Figure 5
#   tune     other tile sizes and ncu's counters, one constant at a time
#   compiled the first layer's benchmark beside torch.compile, which takes its time to compile
#   others   all other tests
# Without a part all but sprites. A part that is stopped keeps what it has; started again it carries on its training
# runs and measures the rest anew. LIMIT=300 in the environment ends each command, of which a part has up to twenty, after
# so many seconds; Ctrl-C then waits for that. Tests run side by side where pytest-xdist is there. The exit code is 1 when
# something failed; FOLDER/failed.txt says what.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-results/gpu}")
shift
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(tests kernels layer step short circles tune compiled others)
python=python3
[ -x .venv/bin/python ] && python=.venv/bin/python # the README's
python=${PYTHON:-$python}
mkdir -p "$out"
rm -f "$out/failed.txt"
limit=()
[ -z "${LIMIT:-}" ] || limit=(timeout -k 10 "$LIMIT")
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
nvidia-smi >"$out/device.txt" 2>&1

logged() { # NAME COMMAND ...: shown and kept
    local log="$out/$1.txt"
    shift
    "${limit[@]}" "$@" 2>&1 | tee "$log" || echo "$*" >>"$out/failed.txt"
}

train() { # NAME FLAG ...: one run in runs/NAME, new, carried on, or done already
    local name=$1 how=(--out "runs/$1")
    shift
    how+=("$@")
    [ -e "runs/$name/checkpoint.pt" ] && how=(--resume "runs/$name")
    "${limit[@]}" "$python" sbvae.py "${how[@]}" >>"$out/train_$name.txt" 2>&1 || echo "sbvae.py ${how[*]}" >>"$out/failed.txt"
    echo "$name: $(grep '^step ' "$out/train_$name.txt" | tail -n 1)"
    cp "runs/$name/metrics.jsonl" "$out/$name.jsonl"
}

lane="gpu or captured or cuda or graph" # in the names of tests
kernel_tests=tests/test_kernels_triton.py

tests() {
    logged tests_gpu "$python" -m pytest -v "${workers[@]}" --continue-on-collection-errors --ignore=$kernel_tests -k "$lane"
}

kernels() {
    logged tests_kernels "$python" -m pytest -v "${workers[@]}" $kernel_tests -k "not random_shapes"
    logged tests_shapes "$python" -m pytest -v "${workers[@]}" $kernel_tests -k random_shapes
}

others() {
    logged tests_others "$python" -m pytest -q "${workers[@]}" --continue-on-collection-errors --ignore=$kernel_tests -k "not ($lane)"
}

layer() {
    logged bench_graph "$python" -m kernels.bench --device cuda --graph --no-compile --out "$out"
    logged bench "$python" -m kernels.bench --device cuda --no-compile --out "$out"
}

compiled() {
    logged bench_compiled "$python" -m kernels.bench --device cuda --out "$out/compiled" \
        --shapes paper-16 paper-256 monet slots --layouts channels_last
}

# Predicted before any measurement, for the broadcast VAE on sprites on an H200, in steps a second: it is bound by its
# many small operations, about 140 a step, 20 of them for the batch (counted on the meta device). Launched one by one
# 250 to 600, whatever the precision and layout; as a graph, at 2 us each and with 0.15 ms of convolutions in bf16, 1,800
# to 2,800; compiled, with half as many, 2,500 to 4,000; the goal is 3,000.
step() {
    logged step "$python" -m kernels.bench --step --replicas 1 2 4 8 --out "$out"
}

short() {
    nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv -l 1 >"$out/use.csv" &
    local watch=$! decoder precision seed
    train sprites-eager --steps 3000 # these three alone: their logs tell the steps a second
    train sprites-graph --steps 20000 --cuda-graph
    train sprites-compiled --steps 20000 --cuda-graph --compile
    kill $watch
    for decoder in broadcast deconv; do
        train sprites-vae-$decoder --decoder $decoder --steps 20000 --cuda-graph &
        train sprites-factorvae-$decoder --model factorvae --decoder $decoder --steps 20000 --cuda-graph &
    done
    wait
    for precision in fp32 tf32 bf16; do
        for seed in 0 1 2; do
            train sprites-$precision-$seed --precision $precision --seed $seed --steps 20000 --cuda-graph &
        done
        wait
    done
    for precision in fp32 tf32 bf16; do
        logged eval_$precision "$python" eval.py runs/sprites-$precision-{0,1,2} &
    done
    logged eval_short "$python" eval.py runs/sprites-compiled runs/sprites-{vae,factorvae}-{broadcast,deconv}
    wait
}

figure() { # NAME DATASET VARIANT ...: its runs side by side, where --reproduce looks for them; then the figure
    local name=$1 data=$2 seed variant
    shift 2
    for ((seed = 0; seed < ${SEEDS:-2}; seed++)); do
        for variant in "$@"; do # as in "broadcast --shuffle-coords"
            local run=$data-${variant/ --shuffle-coords/-shufflecoordsTrue}
            ((seed > 0)) && run+=-seed$seed
            # shellcheck disable=SC2086
            train "$run" --dataset "$data" --seed $seed --cuda-graph --decoder $variant &
        done
    done
    wait
    logged "$name" "$python" eval.py --reproduce "$name" --replicas "${SEEDS:-2}"
    cp -r "results/$name".* "$out"
}

circles() { figure fig4 circles-xy broadcast deconv; }

sprites() { figure fig5 sprites broadcast deconv "broadcast --shuffle-coords"; }

tune() {
    local setting
    for setting in _BLOCK=512 _BLOCK=2048 _BLOCK=4096 _PROGRAMS=1024 _PROGRAMS=4096 _MAX_IMAGES=16 \
        _MAX_IMAGES=64 _BACKWARD_TILE=1024 _BACKWARD_TILE=4096 _PIXELS=32 _PIXELS=128 _CHANNELS=32; do
        "${limit[@]}" "$python" -m kernels.bench --device cuda --no-compile --shapes paper-256 --seconds 0.1 \
            --set "$setting" --out "$out/tune" 2>&1 | grep -E 'triton|FAILED|Error|;' | sed "s/^/$setting /"
    done | tee "$out/tune.txt"
    command -v ncu >/dev/null || return 0
    for setting in forward 'backward|backward_last|finish'; do
        "${limit[@]}" ncu --clock-control none --kernel-name "regex:_($setting)_kernel" --launch-skip 2 --launch-count 8 \
            --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis \
            "$python" -m kernels.bench --device cuda --no-compile --shapes paper-256 --seconds 0.01 \
            --out "$out/tune"
    done >"$out/ncu.txt" 2>&1
}

for part in "${parts[@]}"; do
    case $part in
    tests | kernels | layer | step | short | circles | sprites | tune | compiled | others) $part ;;
    *)
        echo "error: no part $part; see the top of kernels/gpu.sh" >&2
        exit 2
        ;;
    esac
done
[ ! -e "$out/failed.txt" ]
