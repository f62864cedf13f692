#!/usr/bin/env bash
# Builds for the GPU at hand, and stores under FOLDER what the test suite, the sanitizers and the timings print.
# Needs jax with CUDA, nvcc, the build requirements and pytest in the current Python environment.
set -uo pipefail
folder=$(realpath "${1:?usage: benchmarks/gpu.sh FOLDER}")
cd "$(dirname "$0")/.."
mkdir -p "$folder"

architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
CUDAARCHS=$architecture python3 -m pip install --quiet --no-build-isolation --no-deps . || exit
{
  date -u +%F
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  nvcc --version | tail -n 2 | head -n 1
  python3 -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__)'
} | tee "$folder/environment.txt"

workers=()  # several processes share the GPU where pytest-xdist is installed
if python3 -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
echo "== suite"
XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 400 python3 -m pytest -q --require-gpu "${workers[@]}" >"$folder/suite.txt" 2>&1
tail -n 40 "$folder/suite.txt" | cut -c 1-200
echo "== jax-hadacore"
(cd /tmp && timeout 60 jax-hadacore 2>&1) | tee "$folder/selfcheck.txt"
echo "== sanitizers"
for tool in memcheck racecheck initcheck synccheck; do
  XLA_PYTHON_CLIENT_PREALLOCATE=false timeout 120 compute-sanitizer --tool "$tool" \
    python3 benchmarks/sanitize.py >"$folder/$tool.txt" 2>&1
  echo "$tool: $(tail -n 1 "$folder/$tool.txt")"
done
echo "== times"
timeout 200 python3 benchmarks/kernels.py --out "$folder/kernels.json" 2>&1 | tee "$folder/kernels.txt"
