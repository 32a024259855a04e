#!/usr/bin/env bash
# compute-sanitizer on GPU kernel tests: memory errors first, then hazards in shared memory. Needs CUDA's toolkit and a GPU.
#
#   ./launch/sanitize.sh [PYTEST_ARGUMENTS...]    default: the tests named test_small_*, which launch every kernel
#   TOOLS=memcheck ./launch/sanitize.sh           one tool only
#
# Run the same tests with pytest before: that compiles the kernels, at full speed and in parallel (-n 4). Choose small tests: a
# checked kernel takes 10 to 100 times as long. Only our kernels are checked, not PyTorch's. Exit code 86: an error was found.
#
# One hazard that racecheck reports is none, and is not counted: attend_hopper has specialised warps, and the waiting ones read
# the byte that says which part is theirs (Triton's ConvertWarpSpecializeToLLVM). In the machine code that read, the first of shared
# memory in the kernel, lies between two BAR.SYNC 0x1 of the whole block, and so does every write of the byte.
set -uo pipefail
cd "$(dirname "$0")/.."
DISPATCH='Race reported between Read access at attend_hopper\+0x([0-9a-f]|1[0-3])0 in '
only_dispatch() { # LOG: the tests passed and every hazard is the one that is none
  local hazards
  hazards=$(grep -c "Race reported" "$1")
  grep -q "RACECHECK SUMMARY: $hazards hazards displayed ($hazards errors, 0 warnings)" "$1" && ! grep "Race reported" "$1" | grep -qvE "$DISPATCH" &&
    grep -qE "^[0-9]+ passed" "$1" && ! grep -qE "[0-9]+ (failed|error)" <(grep -E "^[0-9]+ (passed|failed)" "$1")
}
if [ "${1:-}" = --judge ]; then only_dispatch "$2"; exit; fi # for tests: judge a log, run nothing
SMALL=(-k test_small tests/gpu/test_grouped_attention_gpu.py tests/gpu/test_triton_codec_gpu.py)
KERNELS=(attend_ plan_dense expand_pages merge_states pack_) # parts of their names; `pack_` is in `unpack_` too
PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not there: install CUDA's toolkit" >&2; exit 2; }
[ $# -gt 0 ] || set -- "${SMALL[@]}"

# API errors are left out: PyTorch probes for functions that the driver may lack, and checks what it calls itself.
# A busy host needs more than the default minute to import PyTorch.
options=(--error-exitcode 86 --print-limit 1000 --target-processes application-only --report-api-errors no --launch-timeout 300)
for name in "${KERNELS[@]}"; do options+=(--kernel-name "kernel_substring=$name"); done
code=0
for tool in ${TOOLS:-memcheck racecheck}; do
  echo "== $tool"
  started=$SECONDS extra=()
  if [ "$tool" = memcheck ]; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor is an allocation of its own, so a read beyond it is seen,
    extra=(--padding 512)                   # also one that would end in the next tensor
  else
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  fi
  log=$(mktemp)
  compute-sanitizer --tool "$tool" "${options[@]}" ${extra[@]+"${extra[@]}"} \
    python3 -m pytest -m gpu -q -x -p no:cacheprovider -o timeout=0 "$@" 2>&1 | tee "$log"
  result=${PIPESTATUS[0]}
  if [ "$result" = 86 ] && [ "$tool" = racecheck ] && only_dispatch "$log"; then
    echo "== all hazards are Triton's dispatch of warps, which is ordered by barriers: none"
    result=0
  fi
  [ "$result" = 0 ] || code=$result
  rm -f "$log"
  echo "== $tool took $((SECONDS - started)) s, exit code so far $code"
done
exit $code
