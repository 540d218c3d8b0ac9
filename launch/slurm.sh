#!/bin/bash
# A job that trains, saves five minutes before its time is over, asks to be queued again, and goes on where it was.
#   sbatch launch/slurm.sh recipes/large.yaml machine.shard=hybrid
# One task a GPU, started by srun itself: no launcher stands between Slurm's signals and the trainer, or between the
# trainer's exit status and this script. However the job ends (time limit, preemption, a lost node), the next start resumes
# from the newest valid checkpoint; no option is needed.
#SBATCH --job-name=llm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
#SBATCH --signal=B:USR1@300      # to this shell; more than the slowest step, evaluation and save take together
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE

# shellcheck disable=SC2016  # the task's variables, not this shell's
srun --kill-on-bad-exit=0 --cpu-bind=none bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python launch/train.py "$@"' task "$@" &
step=$!

ahead=""
# shellcheck disable=SC2317  # reached by the traps
pass_on() { # srun hands it to every task; each finishes its step, all save, and leave with status 75
    kill -"$1" "$step" 2>/dev/null
}
trap 'ahead=yes; pass_on USR1' USR1
trap 'pass_on TERM' TERM

wait "$step"
status=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step"
    status=$?
done

# Requeue after the time limit or a lost process (status 6). Slurm itself requeues after preemption, a cancelled job is meant
# to end, and any other failure would only recur.
if { [ -n "$ahead" ] && [ "$status" -eq 75 ]; } || [ "$status" -eq 6 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
