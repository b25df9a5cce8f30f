#!/usr/bin/env bash
# One command from nothing to a trained model: environment, embedded corpus, tokenizer, and a small LLaMA
# trained with GaLore under FSDP2. No GPU and no Hugging Face hub needed. Options are handed on:
#
#     bash launch/quickstart.sh [--run.dir DIR] [--section.field VALUE …]
#
# Started again, it goes on where it was stopped (Ctrl-C and TERM leave a checkpoint). Exit codes are those
# of the training process: 0 finished, 2 configuration, 3 data, 4 checkpoint, 5 not finite, 75 stopped.
set -euo pipefail

run=runs/quickstart
previous=
for argument in "$@"; do
    case "$previous" in --run.dir) run=$argument ;; esac
    case "$argument" in
        --run.dir=*) run=${argument#*=} ;;
        -h | --help)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit
            ;;
    esac
    previous=$argument
done

cd "$(dirname "$0")/.."
. launch/environment.sh '' # no extras; without an argument it would see the options of this script

# Two processes, on two GPUs or on the CPU with gloo, unless there is just one GPU. They share the cores.
read -r procs threads < <(python -c '
import os, torch
procs = 1 if torch.cuda.device_count() == 1 else 2
print(procs, min(max(len(os.sched_getaffinity(0)) // procs, 1), 4))')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
options=(--config llama_toy_galore --engine.kind fsdp --run.dir "$run" "$@")

# torchrun returns 1 for any failure: what is wrong with the options is said, with its own code, before it.
lrpretrain show llama_toy_galore --procs "$procs" "${options[@]:2}" >/dev/null

echo "training llama_toy with GaLore under FSDP2 in $procs process(es);" \
    "the first run builds its corpus and tokenizer, which takes half a minute"
began=$(date +%s)
# In a process group of its own, so that one signal reaches the launcher and its workers alike.
set -m
torchrun --standalone --nproc-per-node "$procs" -m lrpretrain.pretrain "${options[@]}" &
launcher=$!
trap 'kill -TERM -- -$launcher 2>/dev/null' TERM HUP
trap 'kill -INT -- -$launcher 2>/dev/null' INT
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do
    code=0
    wait "$launcher" || code=$? # a trap interrupted the first wait
done
if [ "$code" -ne 0 ]; then
    # The run folder knows better than torchrun, if this run wrote there.
    recorded=$(python - "$run" "$began" <<'PYTHON'
import json, pathlib, sys
status = pathlib.Path(sys.argv[1], "status.json")
fresh = status.exists() and status.stat().st_mtime >= int(sys.argv[2])
print(json.loads(status.read_text())["exit_code"] or "" if fresh else "")
PYTHON
)
    exit "${recorded:-$code}"
fi

beside=$(printf %q "$(dirname "$run")")
cat <<TEXT

try next:
  .venv/bin/lrpretrain generate $(printf %q "$run") "The function returns"
  .venv/bin/torchrun --standalone --nproc-per-node $procs -m lrpretrain.pretrain --config llama_toy_adamw --engine.kind fsdp --run.dir $beside/quickstart_adamw
  .venv/bin/tensorboard --logdir $beside
TEXT
