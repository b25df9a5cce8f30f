#!/usr/bin/env bash
# Train a recipe under DeepSpeed ZeRO, started by the deepspeed launcher, on one node or on those of a hostfile:
#
#     bash launch/zero.sh RECIPE [--section.field VALUE …]
#
# RECIPE is the name of a shipped one, such as llama_toy_galore, or a YAML file; --engine.ds_config names DeepSpeed's
# settings (zero1, zero2, zero3 or a file). Started again, it goes on from its newest checkpoint; TERM, INT, HUP and
# USR1 leave one. What the processes print is kept in logs/ of the run folder, and what the first one prints is shown.
# Exit codes are those of the training: 0 finished, 2 configuration, 3 data, 4 checkpoint, 5 not finite, 75 stopped.
#
# With a hostfile the nodes share the run folder. A signal then reaches other nodes through the launcher, which gives
# the processes 30 s and does not wait for them: status.json says what became of them.
set -euo pipefail

PROCS=${PROCS:-}                     # processes; default: the slots of the hostfile, else the GPUs, or 2 on the CPU
HOSTFILE=${HOSTFILE:-}               # a file of lines "HOST slots=PROCESSES"; default: this node alone
MASTER_PORT=${MASTER_PORT:-29500}    # a free port of the first node
OMP_NUM_THREADS=${OMP_NUM_THREADS:-} # threads of a process; default: its share of the cores, at most 4

. "$(dirname "$0")/supervise.sh"
case "${1:---help}" in -h | --help) explain && exit ;; esac
recipe=$1
options=(--engine.kind zero "${@:2}")
if [ -n "$HOSTFILE" ]; then
    where=(--hostfile "$HOSTFILE")
    PROCS=$(awk -F slots= '!/^ *#/ { procs += $2 } END { print procs + 0 }' "$HOSTFILE")
else
    # On a CPU the launcher would count NUMA nodes; where a number is given, it forgets CUDA_VISIBLE_DEVICES.
    PROCS=${PROCS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
    where=(--num_gpus "$PROCS")
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        where=(--include "localhost:$(cut -d , -f "-$PROCS" <<<"$CUDA_VISIBLE_DEVICES")")
    fi
fi
check "$PROCS" "$recipe" "${options[@]}"
share_cores "$PROCS"
keep_logs

start() {
    deepspeed "${where[@]}" --master_port "$MASTER_PORT" --log_level warning --enable_each_rank_log "$logs" \
        --module lrpretrain.pretrain --config "$recipe" "${options[@]}" &
    until first=$(ls "$logs"/*_rank0.log 2>/dev/null) || ! kill -0 $! 2>/dev/null; do sleep 0.2; done
    [ -z "$first" ] || tail --follow --lines +1 --sleep-interval 0.2 --pid $! "$first"
    wait $!
}
supervise start
