#!/usr/bin/env bash
# compute-sanitizer on GPU kernel tests: memory errors first, then hazards in shared memory. Needs CUDA's toolkit and a GPU.
#
#   ./launch/sanitize.sh PYTEST_ARGUMENTS...      for example tests/gpu/test_triton_codec_gpu.py -k page_lists
#
# Choose small tests: a check takes 10 to 100 times as long as a run, and compiling comes on top. Exit code 86: an error was found.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor is an allocation of its own, so a read beyond it is seen
for tool in memcheck racecheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 86 --print-limit 20 \
    python3 -m pytest -m gpu -q -x -p no:cacheprovider -o timeout=0 "$@"
done
