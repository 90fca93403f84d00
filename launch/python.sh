# Sourced by the other scripts: creates .venv with the newest Python from 3.11 to 3.13 and installs requirements.txt. Works with
# bash 3.2 of macOS. HALOS_PYTHON selects another interpreter.

find_python() {
  for candidate in ${HALOS_PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
    # a version manager's stub may exist and fail: run the interpreter
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      echo "$candidate"
      return 0
    fi
  done
  echo "error: no Python from 3.11 to 3.13 was found. Install one, such as 3.12 from https://www.python.org/downloads/, or name it: HALOS_PYTHON=/path/to/python3.12" >&2
  return 2
}

use_venv() { # $1: further packages
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  if [ ! -x "$root/.venv/bin/python" ]; then
    python="$(find_python)" || exit 2
    echo "creating .venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || exit 1
  fi
  wanted="$(cat "$root/requirements.txt"; echo "$1")"
  if [ "$(cat "$root/.venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "installing requirements.txt $1 (some minutes the first time)"
    # shellcheck disable=SC2086
    "$root/.venv/bin/python" -m pip install --no-compile --quiet --disable-pip-version-check -r "$root/requirements.txt" $1 || exit 1
    compile_all "$root/.venv/lib"
    printf '%s\n' "$wanted" > "$root/.venv/installed"
  fi
  PATH="$root/.venv/bin:$PATH"
  export PATH
}

compile_all() { # $1: a directory; on all cores, where pip would use one. Some packages hold files that no Python compiles
  "$root/.venv/bin/python" -m compileall -q -j 0 "$1" >/dev/null 2>&1 || true
}

# bfloat16 where it is measured to be faster than float32: on most GPUs, and on few processors that say they have it.
fast_dtype() {
  python -c 'from halos.inspection.speed import fast_dtype; print(fast_dtype())' || exit 1
}
