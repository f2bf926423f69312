#!/usr/bin/env bash
# bench/gpu.sh OUTDIR: all that needs a GPU, in nine minutes and without network. Builds and installs in place, runs the
# tests marked gpu, the benchmark, and a short run under compute-sanitizer. A stage that fails stops none of the later
# ones; the exit status says whether any did. Logs and numbers are in OUTDIR.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash bench/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

TOTAL=525 # seconds
export NUMBA_ENABLE_CUDASIM=0 PYTHONUNBUFFERED=1
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ] && nvcc=$(command -v nvcc); then
  toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  [ ! -d "$toolkit/nvvm" ] || export CUDA_HOME=$toolkit # Numba finds NVVM there where it is not a package
fi

failed=() summary=() status=0
left() { echo $((TOTAL - SECONDS)); }

# stage NAME SECONDS LOG COMMAND...: runs a command; its status is in $status.
stage() {
  local name=$1 limit=$2 log=$out/$3 began=$SECONDS said
  shift 3
  status=0
  printf '\n== %s\n' "$name"
  (($(left) > limit)) || limit=$(left)
  if ((limit < 5)); then
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1 || status=$?
  fi
  case $status in
    0) said=passed ;;
    124 | 137) said="FAILED: out of time" ;;
    *) said="FAILED: status $status" ;;
  esac
  ((status == 0)) || tail -n 25 "$log" 2>/dev/null || true
  say "$name: $said, $((SECONDS - began)) s"
}
say() {
  echo "$1"
  summary+=("$1")
}
must_pass() { ((status == 0)) || failed+=("$1"); }

# --- build -----------------------------------------------------------------------------------------------------------

has_library='import fastopt, importlib.util as u; assert u.find_spec("fastopt._native")'
has_kernels="$has_library"'; from fastopt._cuda.kernels import prebuilt_folder; assert prebuilt_folder()'
for cuda in ON AUTO OFF; do # each build goes on without what it cannot make (pyproject.toml), so look what is there
  stage "build, FASTOPT_CUDA=$cuda" 170 build.log \
    python3 -m pip install -v --no-build-isolation --no-deps -e . "-Ccmake.define.FASTOPT_CUDA=$cuda"
  ! python3 -c "$has_kernels" >>"$out/build.log" 2>&1 || break
  echo "WARNING: FASTOPT_CUDA=$cuda left no prebuilt kernels for CUDA, see build.log: they are compiled on first use"
  [ "$cuda" = ON ] || ! python3 -c "$has_library" >>"$out/build.log" 2>&1 || break
done
python3 -c "$has_library" >>"$out/build.log" 2>&1 || status=1
must_pass build

stage "fastopt info" 60 info.log bash -c 'nvidia-smi; python3 -m pip list | grep -iE "numba|cupy|torch|numpy|llvm|scikit-build|cuda|nvvm"; python3 -m fastopt info'
must_pass info
tail -n 20 "$out/info.log" || true

# --- tests -----------------------------------------------------------------------------------------------------------

# Files that need Numba's simulator cannot be imported beside a real GPU, and have no test for one. Warnings are errors
# elsewhere; here versions of packages meet that no one chose.
ignored=()
for file in $(grep -lE '^(import|from) cuda_simulator' tests/*/*.py); do ignored+=("--ignore=$file"); done
stage "tests" 150 tests.log env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -v -m gpu -W default \
  -o "addopts=-ra --import-mode=importlib" -p no:cacheprovider --continue-on-collection-errors --durations=8 \
  --junitxml="$out/tests.xml" "${ignored[@]}" tests
must_pass tests
tail -n 1 "$out/tests.log" || true

# --- benchmark -------------------------------------------------------------------------------------------------------

for _ in 1 2 3; do # a kernel that broke the GPU for a process leaves it to the next one
  stage "benchmark" $(($(left) - 20)) bench.log \
    python3 -m bench.gpu --out "$out/gpu.json" --resume --limit $(($(left) - 60))
  ((status == 3 || (status > 128 && status != 137))) || break
done
must_pass benchmark

# --- compute-sanitizer -----------------------------------------------------------------------------------------------

found=$(command -v compute-sanitizer || ls "${CUDA_HOME:-}"/bin/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer \
  2>/dev/null | head -n 1 || true)
sanitizer=${COMPUTE_SANITIZER-$found}
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    options=(--tool "$tool" --error-exitcode 9 --launch-timeout 60)
    [ "$tool" = racecheck ] || options+=(--report-api-errors no) # libraries ask for what may not be there
    stage "$tool" 60 sanitizer.log "$sanitizer" "${options[@]}" "$(command -v python3)" -m bench.gpu.sanitize
    must_pass "$tool"
  done
else
  say "compute-sanitizer: not installed, left out"
fi

# --- what came of it -------------------------------------------------------------------------------------------------

printf '\n== stages\n'
printf '%s\n' "${summary[@]}"
((${#failed[@]} == 0)) || echo "FAILED: ${failed[*]}"
printf '\n== benchmark\n'
timeout 60 python3 -m bench.gpu --show "$out/gpu.json" || true
((${#failed[@]} == 0))
