"""One process, and DDP: whole parameters on every process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.nn.parallel import DistributedDataParallel

from lrpretrain.engine.base import Engine
from lrpretrain.model.llama import materialize


class Local(Engine):
    """One process that holds everything."""

    def lay_out(self) -> None:
        """Give the model memory."""
        materialize(self.model, self.device)


class DDP(Local):
    """Whole copies, whose gradients are averaged."""

    def wrap(self) -> None:
        """Wrap the initialised model."""
        self.forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def accumulation(self, last: bool) -> Iterator[None]:
        """Communicate at the last micro-batch only: the gradients are whole in any case."""
        assert isinstance(self.forward, DistributedDataParallel)
        with contextlib.nullcontext() if last else self.forward.no_sync():
            yield
