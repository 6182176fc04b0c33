#!/bin/bash
# A run on whole nodes of one kind: sbatch docs/cluster/slurm.sh CONFIG [RUN_DIRECTORY], from a clone on storage that all nodes share.
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive
#SBATCH --time=04:00:00 --requeue --open-mode=append
#SBATCH --signal=B:USR1@240
set -u
CONFIG=$1
RUN=${2:-$PWD/runs/$(basename "$1" .yaml)}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # where Slurm runs this script, too
PID_FILE=${TMPDIR:-/tmp}/vlarl-$SLURM_JOB_ID.pid
PATH=$PWD/.venv/bin:$PATH
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export CONFIG RUN HEAD PID_FILE PATH RAY_AUTH_MODE RAY_AUTH_TOKEN RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT

# To the run alone: a signal to the whole step would end Ray first.
trap 'test -s "$PID_FILE" && kill -USR1 "$(cat "$PID_FILE")"' USR1
trap 'test -s "$PID_FILE" && kill -TERM "$(cat "$PID_FILE")"' TERM
# The other nodes wait for the head's port: `ray symmetric-run` gives up after 40 s without one.
# shellcheck disable=SC2016
srun bash -c '
    [ "$SLURM_NODEID" = 0 ] || timeout 300 bash -c "until (: >/dev/tcp/$HEAD/6379) 2>/dev/null; do sleep 1; done"
    exec ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- bash -c "
        echo \$\$ > \"$PID_FILE\"
        export RAY_ADDRESS=$HEAD:6379
        exec vlarl train \"$CONFIG\" --run-dir \"$RUN\" --resume auto --set run.stop_seconds=180"' &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done   # a trapped signal ends `wait` early
rm -f "$PID_FILE"
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
