"""Pretrain by the flags of LORO's run_c4.py: `torchrun … -m lrpretrain.authors.loro FLAGS`."""

from functools import partial

from lrpretrain.authors.pretraining import main
from lrpretrain.pretrain import leave

if __name__ == "__main__":
    leave(partial(main, "loro"))
