#!/bin/sh
# gpu.sh FOLDER: build, test and measure on this machine's GPU, in less than ten minutes. FOLDER then holds the CSV and
# log.txt, all that the parts printed.
# Needs $PYTHON (python3) with torch, triton, pytest and hypothesis, and for the CUDA kernels an nvcc, cmake, ninja and
# pybind11. Fetches nothing. Every part runs; one that fails
# fails the whole. $PROCESSES (one per core) tests run side by side: Triton compiles a kernel for each.
set -u
[ $# = 1 ] || { echo "usage: gpu.sh FOLDER" >&2; exit 2; }
begin=$(date +%s)
total=560
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "gpu.sh: torch of $python sees no CUDA device" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
processes=${PROCESSES:-$(getconf _NPROCESSORS_ONLN)}
unset TRITON_INTERPRET MASKOPS_BACKEND MASKOPS_LAYERS MASKOPS_MEASURE
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
logs="$out/logs"
rm -rf "$logs"
mkdir "$logs"
started="" failed="" summary=""

# start NAME SECONDS COMMAND…: in the background, for so many seconds of what is left of the whole
start() {
    name=$1 limit=$2
    shift 2
    left=$((begin + total - $(date +%s)))
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -ge 1 ] || limit=1
    started="$started $name"
    (
        since=$(date +%s)
        timeout -k 5 "$limit" "$@" >"$logs/$name.log" 2>&1
        echo "$? after $(($(date +%s) - since)) s (limit $limit)" >"$logs/$name.exit"
    ) &
}

# finish LINES: wait for all that was started; a line each, the last LINES of each log, and more of one that failed
finish() {
    wait
    for name in $started; do
        line=$(cat "$logs/$name.exit")
        log="$logs/$name.log"
        tail -n "$1" "$log"
        if grep -q "Device not supported" "$log"; then
            line="$line, the sanitizer doesn't know this device"
        elif [ "${name%%-*} ${line%% *}" = "compile 124" ]; then
            line="$line, what is left is compiled later"
        elif [ "${name%%check-*}" != "$name" ] && [ "${line%% *}" = 124 ]; then
            line="$line, not finished, nothing found until then"
        elif [ "${line%% *}" != 0 ]; then
            failed="$failed $name"
            [ "$1" -ge 25 ] || tail -n 25 "$log"
        fi
        line="== $name: exit $line; $(grep -E '^[0-9]+ (passed|failed|skipped|deselected)|^[0-9]+ .* in [0-9.]+s' "$log" |
            tail -n 1)"
        echo "$line"
        summary="$summary$line
"
        { echo "==== $name"; cat "$log"; } >>"$logs/all"
        rm -f "$log" "$logs/$name.exit"
    done
    started=""
}

part() {
    start "$@"
    finish 40
}

sanitizer() {
    command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1
}

part machine 10 "$python" -c 'import platform, torch, triton
print(platform.python_version(), torch.__version__, torch.version.cuda, torch.backends.cudnn.version(), triton.__version__)
print(torch.cuda.get_device_properties(0))'

export OMP_NUM_THREADS=1
# the CUDA kernels for this GPU alone, in the package's folder, where the tests find them
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor}" + ("a" if major == 9 else ""))')
export TORCH_CUDA_ARCH_LIST
part extension 120 "$python" setup.py -q build_ext --inplace
start build 60 "$python" -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target "$out/site" .
share=0
while [ $share -lt "$processes" ]; do
    start "tests-$share" 230 "$python" -m benchmarks.shard "$share/$processes" --seconds 215
    share=$((share + 1))
done
finish 0
rm -rf "$out/site"

# Nothing is timed here, so it runs side by side: one call of every op under the memory checker, and one run of what is
# timed below, which leaves its kernels in the caches of Triton and torch.compile.
check=$(sanitizer)
if [ -n "$check" ]; then
    for tool in memcheck racecheck initcheck synccheck; do
        for backend in cuda triton; do
            start $tool-$backend 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$check" --tool $tool --error-exitcode 9 \
                "$python" -m pytest -p no:cacheprovider -x tests/test_ops.py -k "same_on_every_backend and $backend"
        done
    done
else
    echo "== memcheck, racecheck, initcheck, synccheck: there is no compute-sanitizer"
fi
contestants="official lean tf32 careful compile compile-graphs functional graph maskops floor floor-graph"
for dtype in bfloat16 float32; do
    for net in small_vgg resnet18; do
        # shellcheck disable=SC2086 # names without spaces
        start "compile-$net-$dtype" 60 "$python" -m benchmarks steps --device cuda --net $net --dtype $dtype \
            --contestants $contestants --repeats 1 --no-peaks --compile-limit 45 --out "$logs/unused/$net-$dtype"
    done
done
start compile-ops 65 "$python" -m benchmarks ops --device cuda --dtype bfloat16 float32 --processes "$processes" \
    --seconds 50
finish 0
unset OMP_NUM_THREADS
rm -rf "$logs/unused"

# shellcheck disable=SC2086
part steps 150 "$python" -m benchmarks steps --device cuda --net small_vgg resnet18 --dtype bfloat16 float32 \
    --contestants $contestants --repeats 50 --compile-limit 30 --out "$out"
# one that is at its limit leaves what it has measured until then
part steps-resnet50 50 "$python" -m benchmarks steps --device cuda --net resnet50 --dtype bfloat16 --repeats 20 \
    --contestants official careful graph maskops floor floor-graph --no-peaks --out "$out"
part steps-anp 40 "$python" -m benchmarks steps --device cuda --method anp --net resnet18 --dtype bfloat16 --repeats 20 \
    --contestants official lean careful maskops --loader --out "$out"
part epoch 30 "$python" -m benchmarks epoch --device cuda --dtype bfloat16 --repeats 2 --out "$out"
part sweep 30 "$python" -m benchmarks sweep --device cuda --net small_vgg --dtype bfloat16 --repeats 2 --out "$out"
part ops 80 "$python" -m benchmarks ops --device cuda --dtype bfloat16 float32 --repeats 15 --seconds 70 \
    --out "$out"

mv "$logs/all" "$out/log.txt"
rm -rf "$logs"
echo
printf %s "$summary"
[ -z "$failed" ] || echo "gpu.sh: failed:$failed" >&2
[ -z "$failed" ]
