# Sourced by the sbatch files: every Slurm task becomes one process of the run, so that Slurm's signals reach the ranks
# themselves (`accelerate launch` would forward few of them). A run that was stopped leaves with 75 and is queued again.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
python="${HALOS_PYTHON:-python}"
[ -x .venv/bin/python ] && python="${HALOS_PYTHON:-.venv/bin/python}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((10000 + SLURM_JOB_ID % 50000))" # the same on every node, and another for every job
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

trap : TERM USR1 # for the ranks; this script stays to queue the job again
srun --kill-on-bad-exit=0 "$python" launch/slurm/rank.py "$ACCELERATE_CONFIG" train.py "$@" resume=auto
status="$?"
if [ "$status" -eq 75 ]; then
  echo "stopped after a complete save: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
