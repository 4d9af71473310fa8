#!/usr/bin/env bash
# Sourced by scripts/test and scripts/demo: system packages if they are missing and can be installed, a virtual
# environment in .venv, the Python packages, and an editable build of mixbit. Every step is skipped when it is done.
#   MIXBIT_VENV   another place for the virtual environment
#   MIXBIT_EXTRAS extras of pyproject.toml to install, e.g. "dev,plot" (the caller sets it)
set -euo pipefail
MIXBIT_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$MIXBIT_ROOT"
MIXBIT_VENV="${MIXBIT_VENV:-$MIXBIT_ROOT/.venv}"
say() { printf '\033[1m== %s\033[0m\n' "$*"; }

# A compiler, Python headers and (for the C++ tests) GoogleTest come from the system.
mixbit_missing_packages() {
  command -v g++ >/dev/null || command -v clang++ >/dev/null || printf 'g++ '
  python3 -c 'import venv, ensurepip' 2>/dev/null || printf 'python3-venv '
  python3 -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
    2>/dev/null || printf 'python3-dev '
  if [ "${MIXBIT_BUILD_TESTS:-OFF}" = ON ]; then
    { [ -e /usr/include/gtest/gtest.h ] || [ -e /usr/local/include/gtest/gtest.h ]; } || printf 'libgtest-dev '
  fi
}
packages="$(mixbit_missing_packages)"
if [ -n "$packages" ]; then
  if command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; then
    say "installing $packages"
    sudo=""; [ "$(id -u)" = 0 ] || sudo="sudo"
    $sudo apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq $packages >/dev/null
  else
    echo "mixbit: please install $packages first (no right to install packages here)" >&2
    exit 1
  fi
fi

if [ ! -x "$MIXBIT_VENV/bin/python" ]; then
  say "making the virtual environment $MIXBIT_VENV"
  python3 -m venv "$MIXBIT_VENV"
fi
export PATH="$MIXBIT_VENV/bin:$PATH"
unset PYTHONPATH PYTHONHOME

# The stamp holds what was asked for; a change of pyproject.toml, setup.py or of the extras installs again.
stamp="$MIXBIT_VENV/.mixbit-requirements"
wanted="$(cat pyproject.toml setup.py requirements.txt | cksum) ${MIXBIT_EXTRAS:-}"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  say "installing the Python packages (torch is large: some minutes)"
  python -m pip install --quiet --upgrade "pip>=24"
  python -m pip install --quiet -r requirements.txt
  rm -f "$stamp"
  say "building mixbit"
  python -m pip install --quiet --no-build-isolation --editable ".${MIXBIT_EXTRAS:+[$MIXBIT_EXTRAS]}"
  printf '%s' "$wanted" >"$stamp"
else
  say "building mixbit"
  cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$(command -v python)" \
    -DMIXBIT_BUILD_TESTS="${MIXBIT_BUILD_TESTS:-OFF}" -DMIXBIT_WERROR="${MIXBIT_WERROR:-OFF}" >/dev/null
  cmake --build build
  python scripts/install_python_component.py build python/mixbit
fi
