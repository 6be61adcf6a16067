#!/bin/sh
# gpu.sh FOLDER: build, test and measure on this machine's GPU, with logs and CSV in FOLDER, in less than nine minutes.
# Needs $PYTHON (python3) with torch and pytest. Fetches nothing. Every part runs; one that fails fails the whole.
set -u
[ $# = 1 ] || { echo "usage: gpu.sh FOLDER" >&2; exit 2; }
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    { echo "gpu.sh: torch of $python sees no CUDA device" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
failed=""

# part NAME SECONDS COMMAND…
part() {
    name=$1 limit=$2
    shift 2
    start=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    [ $code = 0 ] || failed="$failed $name"
    echo "== $name: exit $code after $(($(date +%s) - start)) s (limit $limit)"
    tail -n 40 "$out/$name.log"
}

part machine 20 "$python" -c 'import platform, torch
print(platform.python_version(), torch.__version__, torch.version.cuda, torch.backends.cudnn.version())
print(torch.cuda.get_device_properties(0))'
part build 40 "$python" -m pip install -q --no-index --no-build-isolation --no-deps --upgrade --target "$out/site" .
part tests-gpu 80 "$python" -m pytest -p no:cacheprovider -m gpu tests
part tests-functional 80 "$python" -m pytest -p no:cacheprovider -m "not gpu" tests/test_functional*.py
part awm-float32 120 "$python" -m benchmarks awm --device cuda --dtype float32 --compile-limit 40 --out "$out"
part awm-bfloat16 120 "$python" -m benchmarks awm --device cuda --dtype bfloat16 --compile-limit 40 --out "$out"
part ops 70 "$python" -m benchmarks ops --device cuda --dtype float32 bfloat16 --repeats 30 --out "$out"
rm -rf "$out/site"

[ -z "$failed" ] || echo "gpu.sh: failed:$failed" >&2
[ -z "$failed" ]
