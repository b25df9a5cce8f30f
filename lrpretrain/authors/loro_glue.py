"""Fine-tune by the flags of LORO's run_glue.py: `-m lrpretrain.authors.loro_glue FLAGS`."""

from functools import partial

from lrpretrain.authors.glue import main
from lrpretrain.pretrain import leave

if __name__ == "__main__":
    leave(partial(main, "loro"))
