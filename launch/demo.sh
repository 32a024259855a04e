#!/usr/bin/env bash
# First look: environment, a small real model, then vanilla SGLang beside this project on the same chats.
# A few minutes on 2 cores.
# Options go to `sgl-hq ab`, for example: ./launch/demo.sh --arms vanilla,exact --json rows.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./launch/setup_env.sh
say "comparing servers: sgl-hq ab --quick $*"
exec .venv/bin/sgl-hq ab --quick "$@"
