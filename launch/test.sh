#!/usr/bin/env bash
# Environment, then the whole test suite. Options go to pytest, for example: ./launch/test.sh tests/layout -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./launch/setup_env.sh
say "running the tests: pytest $*"
exec .venv/bin/python -m pytest "$@"
