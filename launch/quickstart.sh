#!/usr/bin/env bash
# One command from nothing to a trained model: environment, embedded corpus, tokenizer, and a small LLaMA
# trained with GaLore under FSDP2. No GPU and no Hugging Face hub needed. Options are handed on:
#
#     bash launch/quickstart.sh [--run.dir DIR] [--section.field VALUE …]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
procs=$((gpus == 1 ? 1 : 2)) # two: on GPUs, or on the CPU with gloo
run=runs/quickstart
previous=
for argument in "$@"; do
    case "$previous" in --run.dir) run=$argument ;; esac
    case "$argument" in --run.dir=*) run=${argument#*=} ;; esac
    previous=$argument
done

echo "training llama_toy with GaLore under FSDP2 in $procs process(es)"
# In a process group of its own, so that one signal reaches the launcher and its workers alike.
set -m
torchrun --standalone --nproc-per-node "$procs" -m lrpretrain.pretrain \
    --config llama_toy_galore --engine.kind fsdp --run.dir "$run" "$@" &
launcher=$!
trap 'kill -TERM -- -$launcher 2>/dev/null' TERM
trap 'kill -INT -- -$launcher 2>/dev/null' INT
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do
    code=0
    wait "$launcher" || code=$? # a trap interrupted the first wait
done
if [ "$code" -ne 0 ]; then
    # torchrun returns 1 for any failure; the run folder knows better.
    recorded=$(python - "$run" <<'PYTHON'
import json, pathlib, sys
status = pathlib.Path(sys.argv[1], "status.json")
print(json.loads(status.read_text())["exit_code"] if status.exists() else "")
PYTHON
)
    case "$recorded" in "" | None | 0) exit "$code" ;; *) exit "$recorded" ;; esac
fi

cat <<TEXT

try next:
  .venv/bin/lrpretrain generate $run "The function returns"
  .venv/bin/torchrun --standalone --nproc-per-node $procs -m lrpretrain.pretrain --config llama_toy_adamw --engine.kind fsdp
  .venv/bin/tensorboard --logdir runs
TEXT
