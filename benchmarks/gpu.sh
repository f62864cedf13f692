#!/usr/bin/env bash
# Builds for the GPU at hand, and stores under FOLDER what the stages print: all of them, or those named.
# Needs jax with CUDA, nvcc, the build requirements, rich, matplotlib and pytest in the current Python environment;
# pytest-xdist helps.
set -uo pipefail
usage='usage: benchmarks/gpu.sh FOLDER [bench|dims|fused|inplace|errors|selfcheck|suite|sanitizers]...'
folder=$(realpath "${1:?$usage}")
shift
stages=("$@")
[ $# -gt 0 ] || stages=(bench dims fused inplace errors selfcheck suite sanitizers)
cd "$(dirname "$0")/.."
mkdir -p "$folder"
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several processes share the GPU

suite() {
  local parallel=()
  if python3 -c 'import xdist' 2>/dev/null; then parallel=(-n 12 -p no:benchmark); fi
  timeout 600 python3 -m pytest -q --require-gpu "${parallel[@]}" --ignore tests/test_gpu.py 2>&1
  # Arrays of tens of gigabytes: the pooling allocator would be left with holes too small for the next.
  XLA_PYTHON_CLIENT_ALLOCATOR=platform timeout 300 python3 -m pytest -q --require-gpu --durations 3 tests/test_gpu.py 2>&1
}

selfcheck() { (cd /tmp && timeout 60 jax-hadacore 2>&1); }

sanitizers() {
  local tool type
  for tool in memcheck racecheck initcheck synccheck; do
    for type in float16 bfloat16 float32 float64; do
      timeout 280 compute-sanitizer --tool "$tool" python3 benchmarks/sanitize.py "$type" 2>&1 | sed "s/^/$tool $type: /" &
    done
  done
  wait
}

bench() { timeout 400 jax-hadacore bench --full --json "$folder/bench.json" 2>&1; }

dims() { timeout 100 jax-hadacore bench dims --json "$folder/dims.json" 2>&1; }

fused() { timeout 300 jax-hadacore bench fused --json "$folder/fused.json" 2>&1; }

inplace() { timeout 100 jax-hadacore bench --tables device --inplace --json "$folder/inplace.json" 2>&1; }

errors() { timeout 200 jax-hadacore bench --tables errors --json "$folder/errors.json" 2>&1; }

architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
CUDAARCHS=$architecture python3 -m pip install --quiet --no-build-isolation --no-deps . || exit
{
  date -u +%F
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -n 2 | head -n 1
  python3 -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__)'
} | tee "$folder/environment.txt"

for stage in "${stages[@]}"; do
  echo "== $stage ($SECONDS s)"
  "$stage" >"$folder/$stage.txt"
  tail -n 45 "$folder/$stage.txt" | cut -c 1-200
done
