# Sourced by the sbatch files in the repository's root: every Slurm task is one rank of the run, so that Slurm's signals reach the
# ranks themselves (`accelerate launch` forwards few of them). A run that a signal stopped exits with 75 and is requeued, at most
# HALOS_REQUEUES times (default 100), unless the job was cancelled.

python="${HALOS_PYTHON:-python}"
[ -x .venv/bin/python ] && python="${HALOS_PYTHON:-.venv/bin/python}"
HALOS_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')"
MASTER_ADDR="${HALOS_HOSTS%% *}"
MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))" # the same on every node, different for every job, below the ephemeral ports
export HALOS_HOSTS MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

trap : TERM USR1 # for the ranks; this script continues, to requeue the job
# Ranks end together, and hosts notice within 65 s that another is gone: a rank that is left after that is stuck. srun requests
# CPUs by itself since Slurm 22.05, and with --nodes=2-4 the batch script may see the minimum number of tasks.
options="--kill-on-bad-exit=0 --wait=120 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}"
[ -n "${SLURM_NTASKS_PER_NODE:-}" ] && options="$options --ntasks=$((${SLURM_JOB_NUM_NODES:-1} * SLURM_NTASKS_PER_NODE))"
# shellcheck disable=SC2086
srun $options "$python" launch/slurm/rank.py "$ACCELERATE_CONFIG" train.py "$@" resume=auto
status="$?"
case "$status" in
  75) ;;
  138) status=75 ;; # SIGUSR1, before a rank's interpreter could handle it
  *) exit "$status" ;;
esac

state="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p' | head -n 1)"
if [ "$state" != RUNNING ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID is ending (${state:-unknown}), as after scancel, and is not requeued"
elif [ "${SLURM_RESTART_COUNT:-0}" -ge "${HALOS_REQUEUES:-100}" ]; then
  echo "stopped by a signal; job $SLURM_JOB_ID has been requeued ${SLURM_RESTART_COUNT:-0} times, the maximum"
else
  echo "stopped by a signal: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
