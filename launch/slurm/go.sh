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
# Ranks end together, and hosts notice within some 65 s that another has gone: one that is left after that is stuck. srun asks
# for CPUs itself since Slurm 22.05, and of --nodes=2-4 the batch script may be told the least number of tasks.
options="--kill-on-bad-exit=0 --wait=120 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] && options="$options --ntasks=$((${SLURM_JOB_NUM_NODES:-1} * SLURM_NTASKS_PER_NODE))"
# shellcheck disable=SC2086
srun $options "$python" launch/slurm/rank.py "$ACCELERATE_CONFIG" train.py "$@" resume=auto
status="$?"
case "$status" in
  75) ;;
  138) status=75 ;; # SIGUSR1, before a rank's interpreter could answer it
  *) exit "$status" ;;
esac

state="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1)"
if [ "$state" != RUNNING ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID is ending (${state:-unknown}), as after scancel, and is not queued again"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${HALOS_REQUEUES:-100}" ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID has been queued again ${SLURM_RESTART_COUNT:-0} times, and no more"
else
  echo "stopped by a signal: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
