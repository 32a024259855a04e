#!/usr/bin/env bash
# Environment, then the whole test suite. Options go to pytest, for example: ./launch/test.sh tests/layout -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./launch/setup_env.sh
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
  say "no Chromium here: tests of the report's page in a browser are skipped (apt-get install chromium chromium-driver)"
  export SGL_HQ_NO_BROWSER=1
fi
say "running the tests: pytest $*"
exec .venv/bin/python -m pytest "$@"
