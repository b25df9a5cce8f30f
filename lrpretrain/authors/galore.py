"""Pretrain by the flags of GaLore's torchrun_main.py: `torchrun … -m lrpretrain.authors.galore FLAGS`."""

from functools import partial

from lrpretrain.authors.pretraining import main
from lrpretrain.pretrain import leave

if __name__ == "__main__":
    leave(partial(main, "galore"))
