"""Pretrain by the flags of GradNormLoRP's scripts: `torchrun … -m lrpretrain.authors.gradnormlorp FLAGS`."""

from functools import partial

from lrpretrain.authors.pretraining import main
from lrpretrain.pretrain import leave

if __name__ == "__main__":
    leave(partial(main, "gradnormlorp"))
