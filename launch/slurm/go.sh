# Sourced by the sbatch files, which have gone to the repository's root: every Slurm task becomes one process of the run, so
# that Slurm's signals reach the ranks themselves (`accelerate launch` would forward few of them). A run that a signal stopped
# leaves with 75 and is queued again, at most HALOS_REQUEUES times (default 100), unless somebody has cancelled the job.

python="${HALOS_PYTHON:-python}"
[ -x .venv/bin/python ] && python="${HALOS_PYTHON:-.venv/bin/python}"
HALOS_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
MASTER_ADDR="${HALOS_HOSTS%% *}"
MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))" # the same on every node, another for every job, below what systems hand out
export HALOS_HOSTS MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

trap : TERM USR1 # for the ranks; this script stays to queue the job again
# Ranks end together, so one that ends alone has failed: the others get a minute. srun asks for CPUs itself since Slurm 22.05.
srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  "$python" launch/slurm/rank.py "$ACCELERATE_CONFIG" train.py "$@" resume=auto
status="$?"
[ "$status" -eq 75 ] || exit "$status"

state="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')"
if [ "$state" = CANCELLED ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID was cancelled and stays out of the queue"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${HALOS_REQUEUES:-100}" ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID has been queued again ${SLURM_RESTART_COUNT:-0} times, and no more"
else
  echo "stopped by a signal: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
