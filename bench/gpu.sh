#!/usr/bin/env bash
# bash bench/gpu.sh OUTDIR [STAGE...]: all that needs a GPU, in stages, without network; no STAGE means all, in this order:
#   smoke      do kernels load and run: a step of each kind, with the bits of the CPU; with the build about 90 s
#   bits       the tests marked gpu: the bits of the CPU for every rule and dtype, norms, streams, graphs; at most 2 minutes
#   bandwidth  large arrays beside a copy on the device and torch, fused and foreach; at most 2 minutes
#   rest       many arrays, graphs, GradScaler, LARS, clipping, norms, registers, compute-sanitizer; at most 4 minutes
# The package is built and installed in place first. Each stage has its own limit and writes what it found to OUTDIR when
# it ends; one that fails stops none of the later ones. Exit status: 0 all passed, 1 something failed, 2 bad arguments.
set -uo pipefail
stages=(smoke bits bandwidth rest)
usage() { echo "usage: bash bench/gpu.sh OUTDIR [STAGE...], with stages ${stages[*]}${1:+; $1}" >&2; exit 2; }
[ $# -ge 1 ] || usage
folder=$1
shift
for name in "$@"; do [[ " ${stages[*]} " == *" $name "* ]] || usage "there is no stage '$name'"; done
[ $# -eq 0 ] || stages=("$@")
mkdir -p "$folder" || exit 2
out=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 2

export NUMBA_ENABLE_CUDASIM=0 PYTHONUNBUFFERED=1
export PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
if [ -z "${CUDA_HOME:-}${CUDA_PATH:-}" ] && nvcc=$(command -v nvcc); then
  toolkit=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
  [ ! -d "$toolkit/nvvm" ] || export CUDA_HOME=$toolkit # Numba finds NVVM there where it is not a package
fi

# --- stages ----------------------------------------------------------------------------------------------------------

failed=0 stage='' ends=0 began=0 verdict=''

begin() { # begin STAGE SECONDS
  stage=$1 began=$SECONDS ends=$((SECONDS + $2)) verdict=''
  printf '\n== %s\n' "$stage"
}
left() { echo $((ends - SECONDS)); }
say() { echo "$1" | tee -a "$out/summary.txt"; }
run() { # run COMMAND...: within the time of the stage, into its log; returns the command's status, 124 for out of time
  local status=0
  (($(left) > 0)) || return 124
  timeout --kill-after=5 "$(left)" "$@" >>"$out/$stage.log" 2>&1 || status=$?
  ((status != 137)) || status=124
  return "$status"
}
must() { # must NAME COMMAND...: the stage fails if it does
  local name=$1
  shift
  run "$@" || fail "$name" $?
}
fail() { # fail NAME STATUS
  local why="status $2"
  (($2 != 124)) || why="out of time"
  tail -n 25 "$out/$stage.log"
  verdict+="${verdict:+, }$1 ($why)"
}
finish() {
  local took=$((SECONDS - began))
  if [ -z "$verdict" ]; then
    say "$stage: passed, $took s"
  else
    failed=1
    say "$stage: FAILED: $verdict, $took s"
  fi
}
show() { # show FILE: the tables of a measurement, also of one that was cut short
  [ ! -f "$1" ] || timeout 60 python3 -m bench gpu --show "$1" 2>&1 | tee -a "$out/$stage.log"
}
measure() { # measure RESERVE: the cases of this stage, but for so many seconds at its end
  local file=$out/$stage.json status=0
  rm -f "$file"
  for _ in 1 2 3; do # a kernel that broke the GPU for a process leaves it to the next one
    status=0
    run python3 -m bench gpu "$stage" --out "$file" --resume --limit $(($(left) - $1)) || status=$?
    ((status == 3 || (status > 128 && status != 137))) || break
  done
  ((status == 0)) || fail "benchmark" "$status"
  show "$file"
}

build() {
  begin build 170
  local library='import fastopt, importlib.util as u; assert u.find_spec("fastopt._native")' cuda
  local kernels="$library"'; from fastopt.engine.cuda.kernels import prebuilt_folder; assert prebuilt_folder()'
  for cuda in ON AUTO OFF; do
    # What an earlier build left does not count where this one failed; and one that went on without what it could not
    # make is found out by looking.
    if run python3 -m pip install -v --no-build-isolation --no-deps -e . "-Ccmake.define.FASTOPT_CUDA=$cuda"; then
      if run python3 -c "$kernels"; then finish; return; fi
      [ "$cuda" = ON ] || ! run python3 -c "$library" || break
    fi
    echo "WARNING: FASTOPT_CUDA=$cuda left no prebuilt kernels for CUDA, see build.log: they are compiled on first use"
    [ "$cuda" != OFF ] || fail "no compiled library" 1
  done
  finish
}

smoke() {
  begin smoke 60
  run nvidia-smi
  run bash -c 'python3 -m pip list | grep -iE "numba|cupy|torch|numpy|llvm|scikit-build|cuda|nvvm"'
  must "fastopt info" python3 -m fastopt info
  must "steps" python3 -m bench.gpu.smoke
  tail -n 20 "$out/smoke.log"
  finish
}

bits() {
  begin bits 120
  # Files that need Numba's simulator cannot be imported beside a real GPU, and have no test for one. Warnings are errors
  # elsewhere; here versions of packages meet that no one chose.
  local ignored=() file
  for file in $(grep -lE '^(import|from) cuda_simulator' tests/*/*.py); do ignored+=("--ignore=$file"); done
  must "tests" env PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 python3 -m pytest -v -m gpu -W default \
    -o "addopts=-ra --import-mode=importlib" -p no:cacheprovider --continue-on-collection-errors --durations=8 \
    "${ignored[@]}" tests/cuda tests/torch
  tail -n 1 "$out/bits.log"
  finish
}

bandwidth() {
  begin bandwidth 120
  measure 15
  finish
}

rest() {
  begin rest 240
  must "registers" python3 -m bench.gpu.registers
  measure 70
  local found tool options
  found=$(command -v compute-sanitizer ||
    ls "${CUDA_HOME:-}"/bin/compute-sanitizer /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
  found=${COMPUTE_SANITIZER-$found}
  [ -n "$found" ] || say "compute-sanitizer: not installed, left out"
  for tool in ${found:+memcheck racecheck}; do
    options=(--tool "$tool" --error-exitcode 9 --launch-timeout 60)
    [ "$tool" = racecheck ] || options+=(--report-api-errors no) # libraries ask for what may not be there
    must "$tool" "$found" "${options[@]}" "$(command -v python3)" -m bench.gpu.smoke --sanitized
  done
  finish
}

build
for name in "${stages[@]}"; do "$name"; done
printf '\n== stages\n'
cat "$out/summary.txt"
exit "$failed"
