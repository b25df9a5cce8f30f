#!/usr/bin/env bash
# Train a recipe under FSDP2 on one node, started by torchrun:
#
#     bash launch/fsdp.sh RECIPE [--section.field VALUE …]
#
# RECIPE is the name of a shipped one, such as llama_toy_galore, or a YAML file. Started again, it goes on from its
# newest checkpoint; TERM, INT, HUP and USR1 leave one. What the processes print is kept in logs/ of the run folder.
# Exit codes are those of the training: 0 finished, 2 configuration, 3 data, 4 checkpoint, 5 not finite, 75 stopped.
set -euo pipefail

PROCS=${PROCS:-}                     # processes; default: the GPUs of this node, or 2 on its CPU
OMP_NUM_THREADS=${OMP_NUM_THREADS:-} # threads of a process; default: its share of the cores, at most 4

. "$(dirname "$0")/supervise.sh"
case "${1:---help}" in -h | --help) explain && exit ;; esac
recipe=$1
options=(--engine.kind fsdp "${@:2}")
PROCS=${PROCS:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
check "$PROCS" "$recipe" "${options[@]}"
share_cores "$PROCS"
keep_logs
supervise torchrun --standalone --nproc-per-node "$PROCS" --log-dir "$logs" --tee 3 \
    -m lrpretrain.pretrain --config "$recipe" "${options[@]}"
