#!/usr/bin/env bash
# Makes .venv with this project, SGLang and everything the demo and the tests need (8.5 GB). demo.sh and test.sh source
# it, so that its settings reach what they start; run by itself it only sets up. The second time it compares a stamp.
# No root, and nothing is written outside the checkout and uv's cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAMP=.venv/.sgl_hq_stamp
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"     # seconds; single wheels are above 500 MB
# A company's proxy is known to the system's certificates, not to uv's own.
if [[ -s /etc/ssl/certs/ca-certificates.crt ]]; then export UV_SYSTEM_CERTS=1; fi
# Where this is set (containers), every server start would compile PyTorch and SGLang again: 13 s of processor time.
export PYTHONDONTWRITEBYTECODE=

say()  { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*"; }
fail() { say "cannot go on: $*" >&2; exit 1; }

# Runs, and is CPython of minor version $2. A pyenv shim exists for versions that do not run, so try it.
is_python() {
  "$1" -c "import sys; sys.exit(sys.implementation.name != 'cpython' or sys.version_info[:2] != (3, $2))" >/dev/null 2>&1
}

find_python() {  # prints the path of the first usable interpreter, 3.12 preferred
  local minor candidate
  for minor in 12 13 11; do
    while IFS= read -r candidate; do
      if is_python "$candidate" "$minor"; then printf '%s\n' "$candidate"; return 0; fi
    done < <(
      type -ap "python3.$minor" python3 python
      compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor.*/bin/python3.$minor" | sort -rV
    )
  done
  return 1
}

find_uv() {  # sets UV to a command that works; installs uv into .venv-uv when there is none
  local attempt
  for attempt in "uv" "python3 -m uv" ".venv-uv/bin/uv"; do
    if $attempt --version >/dev/null 2>&1; then read -ra UV <<<"$attempt"; return 0; fi
  done
  say "no uv found: installing it into .venv-uv"
  rm -rf .venv-uv
  "$1" -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv ||
    fail "uv could not be installed. Install it (https://docs.astral.sh/uv) and run this again."
  UV=(.venv-uv/bin/uv)
}

set_up() {
  local stamp started=$SECONDS python free_gb
  # The folder belongs to the stamp: console scripts and the editable install hold absolute paths.
  stamp="$(cat pyproject.toml launch/setup_env.sh <(pwd -P) | sha256sum | cut -d' ' -f1)"
  if [[ -f $STAMP && "$(<"$STAMP")" == "$stamp" ]] && .venv/bin/python -c '' 2>/dev/null; then
    say "environment .venv is up to date"
    return 0
  fi
  python="$(find_python)" || fail "no Python 3.11, 3.12 or 3.13 found. Install one: apt install python3.12, or pyenv install 3.12"
  find_uv "$python"
  if ! .venv/bin/python -c '' 2>/dev/null; then
    say "creating .venv with $("$python" --version) ($python)"
    "${UV[@]}" venv --quiet --clear --no-python-downloads --python "$python" .venv
  fi
  free_gb=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1000000))
  ((free_gb >= 12)) || say "only $free_gb GB free here; the environment needs about 9 GB"
  say "installing SGLang, PyTorch and this project into .venv (8.5 GB; seconds from a warm cache, else the download)"
  rm -f "$STAMP"
  "${UV[@]}" pip install --python .venv/bin/python --editable '.[demo,plots,test]' ||
    fail "the installation failed, see above. Check network and disk, then run this again: it continues."
  printf '%s\n' "$stamp" >"$STAMP"
  say "environment ready after $((SECONDS - started)) s"
}

set_up
