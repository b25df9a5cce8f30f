"""Fine-tune by the flags of GradNormLoRP's test_fine.py: `-m lrpretrain.authors.gradnormlorp_glue FLAGS`."""

from functools import partial

from lrpretrain.authors.glue import main
from lrpretrain.pretrain import leave

if __name__ == "__main__":
    leave(partial(main, "gradnormlorp"))
