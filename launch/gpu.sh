#!/usr/bin/env bash
# Checks halos on one CUDA card: crashes, exactness, deterministic mode, resume, merge, speed and memory. No network, and nothing
# but requirements.txt. Under nine minutes on an H100, under three on any card with ONLY=quick.
#   bash launch/gpu.sh [OUT_DIR]                    all checks; gpu.json, gpu.md and logs/ in OUT_DIR (runs/gpu)
#   ONLY=quick bash launch/gpu.sh                   the quick ones
#   ONLY=exact,speed-1.5b-full bash launch/gpu.sh   checks by name or by the first part of their names
#   DEVICE=cpu ONLY=quick bash launch/gpu.sh        the same code on a CPU at toy sizes, to try the suite itself
# Exit status: 0 all checks passed (those that the card is too small for do not count), 1 not, 2 wrong input.
# The interpreter is HALOS_PYTHON, else .venv/bin/python, else the newest Python from 3.11 to 3.13.
set -eu
case "${1:-}" in
  -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
  -*) echo "error: no option '$1'; --help lists all" >&2; exit 2 ;;
  "") ;;
  /*) out="$1" ;;
  *) out="$PWD/$1" ;;
esac
[ "$#" -le 1 ] || { echo "error: one argument, the output directory; --help lists all" >&2; exit 2; }
cd "$(dirname "$0")/.."

if [ -n "${HALOS_PYTHON:-}" ]; then
  python="$HALOS_PYTHON"
elif [ -x .venv/bin/python ]; then
  python=.venv/bin/python
else
  . launch/python.sh
  python="$(find_python)" || exit 2
fi
"$python" - <<'P' || exit 2
import importlib.util, sys
names = ["torch", "transformers", "accelerate", "peft", "hydra", "omegaconf", "datasets", "safetensors", "psutil"]
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)}: pip install -r requirements.txt, or name another HALOS_PYTHON")
P
PYTHONPATH="launch${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m gpu.suite "${out:-runs/gpu}"
