#!/usr/bin/env bash
# Lint, types and tests on a fresh machine: creates .venv if needed, installs, runs. Arguments go to pytest.
#   bash launch/test.sh               what CI runs
#   bash launch/test.sh slow          the long matrices
#   bash launch/test.sh slow GROUP    one group of them: the names below
set -eu
cd "$(dirname "$0")/.."

slow_group() { # prints the paths of its tests
  case "$1" in
    kills) echo tests/checkpoint ;;
    moves) echo tests/launch/test_exactness.py tests/launch/test_earlier_runs.py ;;
    strategies) echo tests/launch/test_strategies.py tests/launch/test_two_processes.py tests/launch/test_every_loss_on_two.py ;;
    signals) echo tests/launch/test_signals.py tests/launch/test_slurm.py tests/launch/test_hosts.py ;;
    sweeps) echo tests/launch/test_sweeps.py tests/launch/test_gallery.py ;;
    online) echo tests/online ;;
    merges) echo tests/merge ;;
    architectures) echo tests/logps ;;
    growth) echo tests/trainers ;;
    data) echo tests/data tests/config tests/run/test_mixture.py tests/run/test_stream.py ;;
    versions) echo tests/test_oldest_versions.py ;;
    gpu) echo tests/launch/test_gpu_suite.py ;;
    *) echo "error: there is no group $1; there are kills, moves, strategies, signals, sweeps, online, merges, architectures, growth, data, versions and gpu" >&2; exit 2 ;;
  esac
}
# the oldest transformers that requirements.txt allows, with its hub client, for tests/test_oldest_versions.py
install_oldest() {
  oldest="transformers==5.17.0 huggingface-hub==1.33.0"
  if [ "$(cat .venv/oldest/installed 2>/dev/null)" != "$oldest" ]; then
    rm -rf .venv/oldest
    # shellcheck disable=SC2086
    python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps --target .venv/oldest $oldest || exit 1
    compile_all .venv/oldest
    echo "$oldest" > .venv/oldest/installed
  fi
}
needs_oldest=""
if [ "${1:-}" = slow ]; then
  paths="$([ "$#" -lt 2 ] || slow_group "$2")"
  case "${2:-versions}" in versions) needs_oldest=1 ;; esac
  # shellcheck disable=SC2086
  set -- -m slow $paths
fi
. launch/python.sh
use_venv "pytest>=8 pytest-xdist>=3.6 hypothesis>=6 ruff==0.17.6 pyrefly==1.4.1 tensorboard>=2.18 pyroute2>=0.9 hydra-optuna-sweeper==1.3.0 hydra-submitit-launcher==1.2.0 hatchling==1.33.0 hatch-requirements-txt==0.4.1 openai==3.57.0 math-verify==0.9.0 deepspeed==0.19.8"
[ -z "$needs_oldest" ] || install_oldest

export CUDA_VISIBLE_DEVICES=""  # the tests run on the CPU
export PYTHONDONTWRITEBYTECODE=""  # until tests run: tests/conftest.py
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check .
pyrefly check
if [ "$#" -gt 0 ]; then
  exec python -m pytest "$@"
fi
# in memory, where there is room: thousands of runs are written, synced, read once and deleted
room="$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 }')"
if [ -z "${TMPDIR:-}" ] && [ "${room:-0}" -gt 4000000 ]; then
  export TMPDIR=/dev/shm
fi
# what three workers would each compile; without values in assertions, which those that failed get in a second run
python -m compileall -q -j 0 halos launch tests
python -m pytest -n 3 --dist worksteal -m "not slow" --assert=plain || {
  status=$?
  echo "those that failed, once more, with the values of their assertions"
  python -m pytest --last-failed --last-failed-no-failures=none -m "not slow" || true
  exit $status
}
