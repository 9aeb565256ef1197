# Sourced by the other tools: `set_up` makes .venv and installs this package into it.
#
#   set_up         what running needs
#   set_up dev     and what testing and checking need
#
# Runs pip only when pyproject.toml, the constraints or this file changed, so a second call takes
# a moment. Without CUDA, torch is the CPU build and stays it. PYTHON=... chooses the interpreter.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
constraints="$root/tools/constraints-cpu.txt"
unset PYTHONDONTWRITEBYTECODE # else every process would compile anew what `pip_install` does not

set_up() {
  local extra="${1:-run}" wanted stamp
  lock_venv
  wanted="$(cat "$root/pyproject.toml" "$constraints" "$root/tools/setup.sh" | sha256sum)"
  for stamp in "$venv/.setup-$extra" "$venv/.setup-dev"; do # dev contains run
    if is_stamped "$stamp" "$wanted"; then
      unlock_venv
      return
    fi
  done
  echo "setting up .venv (a minute or two, once)"
  [[ -x "$venv/bin/python" ]] || make_venv
  has_cuda || install_cpu_torch
  install_package "$extra"
  printf '%s\n' "$wanted" >"$venv/.setup-$extra"
  unlock_venv
}

lock_venv() {
  mkdir -p "$venv"
  exec 9>"$venv/.setup-lock"
  flock 9 # two tools started at once set up one after the other
}

unlock_venv() {
  exec 9>&-
}

is_stamped() {
  [[ -f "$1" && "$(<"$1")" == "$2" ]]
}

has_cuda() {
  command -v nvidia-smi >/dev/null 2>&1 || [[ -e /dev/nvidia0 ]]
}

make_venv() {
  local candidate is_new_enough='import sys; raise SystemExit(sys.version_info < (3, 11))'
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$is_new_enough"; then
      "$candidate" -m venv "$venv" && return
      echo "$candidate cannot make a virtual environment; install its venv package" >&2
      exit 2
    fi
  done
  echo "no Python 3.11 or newer was found (tried ${PYTHON:-python3, 3.13, 3.12, 3.11}); set PYTHON" >&2
  exit 2
}

# Python compiles a module when it is first imported; few of those installed ever are.
pip_install() {
  "$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check "$@"
}

install_cpu_torch() {
  local torch
  torch="$(grep '^torch==' "$constraints")"
  is_cpu_torch "$torch" && return
  echo "  $torch, CPU build"
  # The CPU build is a version of its own where the configured index has it; uv knows where it is.
  pip_install "$torch+cpu" 2>/dev/null && return
  pip_install uv
  "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend=cpu "$torch"
}

is_cpu_torch() {
  "$venv/bin/python" - "$1" <<'PYTHON'
import sys
from importlib import metadata

try:
    raise SystemExit(f"torch=={metadata.version('torch')}" != sys.argv[1] + "+cpu")
except metadata.PackageNotFoundError:
    raise SystemExit(1) from None
PYTHON
}

install_package() {
  local target="$root" torch
  [[ "$1" == dev ]] && target="$root[dev]"
  echo "  npr-megatron and what it needs"
  if has_cuda; then
    pip_install --editable "$target"
    return
  fi
  pip_install --editable "$target" --constraint "$constraints"
  torch="$(grep '^torch==' "$constraints")"
  if ! is_cpu_torch "$torch"; then
    echo "torch was replaced by another build; remove .venv and run this again" >&2
    exit 2
  fi
}
