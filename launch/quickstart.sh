#!/usr/bin/env bash
# One command from nothing to a trained model: environment, embedded corpus, tokenizer, and a small LLaMA
# trained with GaLore under FSDP2. No GPU and no Hugging Face hub needed. Options are handed on:
#
#     bash launch/quickstart.sh [--run.dir DIR] [--section.field VALUE …]
#
# Started again, it goes on where it was stopped (Ctrl-C and TERM leave a checkpoint). Exit codes are those
# of the training process: 0 finished, 2 configuration, 3 data, 4 checkpoint, 5 not finite, 75 stopped.
set -euo pipefail

case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;; esac
cd "$(dirname "$0")/.."
. launch/environment.sh '' # no extras; without an argument it would see the options of this script
. launch/supervise.sh

# Two processes, on two GPUs or on the CPU with gloo, unless there is just one GPU.
procs=$(python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
options=(--engine.kind fsdp --run.dir runs/quickstart "$@")
check "$procs" llama_toy_galore "${options[@]}"
share_cores "$procs"

echo "training llama_toy with GaLore under FSDP2 in $procs process(es);" \
    "the first run builds its corpus and tokenizer, which takes half a minute"
supervise torchrun --standalone --nproc-per-node "$procs" \
    -m lrpretrain.pretrain --config llama_toy_galore "${options[@]}"

beside=$(printf %q "$(dirname "$run")")
cat <<TEXT

try next:
  .venv/bin/lrpretrain generate $(printf %q "$run") "The function returns"
  .venv/bin/torchrun --standalone --nproc-per-node $procs -m lrpretrain.pretrain --config llama_toy_adamw --engine.kind fsdp --run.dir $beside/quickstart_adamw
  .venv/bin/tensorboard --logdir $beside
TEXT
