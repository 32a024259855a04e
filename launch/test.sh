#!/usr/bin/env bash
# Environment, then the whole test suite. Options go to pytest, for example: ./launch/test.sh tests/layout -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./launch/setup_env.sh
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  say "no Chromium here: tests of the report's page in a browser are skipped (apt-get install chromium chromium-driver)"
  export HQ_NO_BROWSER=1  # SGLang takes SGL_HQ_* for its own SGLANG_HQ_*, and so for settings of ours
fi
say "running the tests: pytest $*"
exec .venv/bin/python -m pytest "$@"
