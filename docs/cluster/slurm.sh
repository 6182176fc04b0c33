#!/bin/bash
# A run on whole nodes of one kind: sbatch docs/cluster/slurm.sh CONFIG [RUN_DIRECTORY], from a clone on storage that all nodes share.
#SBATCH --nodes=2 --ntasks-per-node=1 --exclusive
#SBATCH --time=04:00:00 --requeue --open-mode=append
#SBATCH --signal=B:USR1@240
set -u
config=$1
run=${2:-$PWD/runs/$(basename "$config" .yaml)}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)   # where Slurm runs this script, too
pid=${TMPDIR:-/tmp}/vlarl-$SLURM_JOB_ID.pid
PATH=$PWD/.venv/bin:$PATH
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
RAY_AUTH_MODE=token
RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300
export PATH RAY_AUTH_TOKEN RAY_AUTH_MODE RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT

# To the run alone: a signal to the whole step would end Ray first.
trap 'test -s "$pid" && kill -USR1 "$(cat "$pid")"' USR1
trap 'test -s "$pid" && kill -TERM "$(cat "$pid")"' TERM
# shellcheck disable=SC2016
srun ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats -- \
    bash -c 'echo $$ > "$1"; exec env RAY_ADDRESS="$2" vlarl train "$3" --run-dir "$4" --resume auto --set run.stop_seconds=180' \
    run "$pid" "$head:6379" "$config" "$run" &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done   # a trapped signal ends `wait` early
rm -f "$pid"
[ "$code" -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
