"""How a step runs: forward, backward, clip, update. The training loop knows engines by this only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrpretrain.engine.later import Later, Stopwatch
from lrpretrain.engine.layers import Layers, total_norm
from lrpretrain.optim import ShardedOptimizer
from lrpretrain.sharding import Holding, Piece, hold
from lrpretrain.sharding.procs import Procs

Mask = Callable[[Tensor], Tensor]
Judge = Callable[[Tensor], Tensor]
Objective = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Step:
    """What came of an optimizer step. To ask for more than `loss_sum` waits until the device is done."""

    loss_sum: Tensor
    """This process's sum of token losses, on the device."""
    came: Later
    """Loss, norm of the raw gradient, and whether the step was sound."""
    update: Stopwatch
    """Of clipping and update."""

    @cached_property
    def loss(self) -> float:
        """Mean of the token losses, over all processes."""
        return self.came.read()[0]

    @cached_property
    def grad_norm(self) -> float:
        """Norm of the raw gradient, over all processes."""
        return self.came.read()[1]

    @cached_property
    def sound(self) -> bool:
        """Whether loss and gradient were such that the update was made; else nothing was changed.

        With `Layers`, if it is for the gradient, nothing of the blocks where that is not finite.
        """
        return bool(self.came.read()[2])


class Engine:
    """A model, its optimizer and the way they are spread over processes.

    `model` is the module with the parameters' plain names; `forward` is what is called, which may
    wrap it; `holdings` is what this process has of every parameter. `mask` makes an attention mask
    (b, 1, l, l) from token ids (b, l); None is plain causal attention. `objective` is the summed loss () of
    a micro-batch, of ids (b, l) if nothing else is set. Methods are collective.
    """

    def __init__(
        self, model: PreTrainedModel, procs: Procs, device: torch.device, pad_id: int, mask: Mask | None
    ):
        self.model = model
        self.forward: nn.Module = model
        self.procs = procs
        self.device = device
        self.pad_id = pad_id
        self.mask = mask
        self.objective: Objective = self._token_loss_sum
        # Both are set once the parameters are where they stay. Looked up anew, FSDP2 may show whole copies in
        # the compute dtype: after a forward without backward the root stays unsharded.
        self.holdings: list[Holding]
        self.optimizer: ShardedOptimizer
        self.layers: Layers | None = None  # which update the model in the backward, if it is done there
        self._last: Step | None = None

    def lay_out(self) -> None:
        """Lay out the model, which has no memory yet, over the processes, and give it memory."""
        raise NotImplementedError

    def hold(self) -> list[Holding]:
        """Return what this process has of every parameter, once the model is laid out."""
        return [hold(name, param) for name, param in self.model.named_parameters()]

    def publish(self) -> None:
        """Let the network see weights that were written into the holdings."""

    def train_step(
        self,
        micros: Sequence[Any],
        targets: int,
        clip_norm: float | None,
        lr_ratio: float,
        judge: Judge = torch.isfinite,
    ) -> Step:
        """Do one optimizer step with this process's micro-batches, of which `objective` makes the loss.

        `targets` is the number of tokens or rows that the loss of the whole step is taken over, on all
        processes: each weighs 1/targets. Gradients are clipped to `clip_norm`, and parameters updated with
        `lr_ratio` times their peak learning rates, if the step is sound: `judge` finds the mean loss () fine,
        in a bool () on the device, and the gradient is finite. The host does not wait for either.
        """
        watch = Stopwatch(self.device)

        def ready(loss_sum: Tensor) -> tuple[Tensor, Tensor]:
            loss = self.total(loss_sum.clone()) / max(targets, 1)
            fine = judge(loss)
            self.settle()
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_ratio
            return loss, fine

        if (layers := self.layers) is not None:

            def begin(loss_sum: Tensor) -> None:
                layers.begin(*ready(loss_sum), clip_norm, watch)

            loss_sum = self.accumulate(micros, targets, begin)
            loss, norm, sound = layers.end()
        else:
            loss_sum = self.accumulate(micros, targets)
            loss, fine = ready(loss_sum)  # the host sees the last step end while the device is busy with this
            with watch:
                norm, sound = self.update(clip_norm, fine)
        came = Later(torch.stack([value.double() for value in (loss, norm, sound)]))
        self._last = Step(loss_sum, came, watch)
        return self._last

    def settle(self) -> None:
        """See whether the last step was sound, and leave no trace of it if not. Waits for its end only."""
        if self._last is not None:
            self.optimizer.settle(self._last.sound)
        self._last = None

    def accumulate(
        self, micros: Sequence[Any], targets: int, ready: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Run forward and backward; return this process's sum of token losses, on the device.

        `ready` is called with it before the last backward.
        """
        self.forward.train()
        total = torch.zeros((), device=self.device)
        for i, micro in enumerate(micros):
            with self.accumulation(last=i == len(micros) - 1):
                loss = self.objective(micro)
                total += loss.detach()
                if ready is not None and i == len(micros) - 1:
                    ready(total)
                # Engines average gradients over the processes; times their number that is a sum.
                self.backward(loss * (self.procs.n_procs / max(targets, 1)))
        return total

    def backward(self, loss: Tensor) -> None:
        """Run backward for one micro-batch."""
        loss.backward()

    def update(self, clip_norm: float | None, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Clip, update the parameters if the step is sound, and drop the gradients.

        Returns the norm of the raw gradient over all processes, and whether it is finite and `fine` holds.
        """
        norm = self.clip(clip_norm)
        sound = fine & norm.isfinite()
        self.optimizer.step_if(sound)
        self.optimizer.zero_grad()
        return norm, sound

    @torch.no_grad()
    def loss_sum(self, micro: Any) -> Tensor:
        """Return the sum of the losses of a micro-batch, without gradients."""
        self.forward.eval()
        return self.objective(micro)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other lengths would be compiled anew
    def next_logits(self, ids: Tensor) -> Tensor:
        """Return the logits after the last of the ids (1, l), shaped (v,); the same ids on every process."""
        self.forward.eval()
        logits: Tensor = self.forward(input_ids=ids.to(self.device), logits_to_keep=1).logits
        return logits[0, -1].float()

    def total(self, value: Tensor) -> Tensor:
        """Add up a scalar of the device over the processes."""
        if self.procs.n_procs > 1:
            torch.distributed.all_reduce(value)
        return value

    def pieces(self) -> dict[str, Piece]:
        """Return what a checkpoint stores of the model and the optimizer: this process's tiles, by name."""
        self.settle()
        pieces = {f"model/{h.name}": h.piece for h in self.holdings}
        return pieces | {f"optim/{name}/{key}": piece for name, key, piece in self.optimizer.pieces()}

    @contextlib.contextmanager
    def accumulation(self, last: bool) -> Iterator[None]:
        """Surround one micro-batch; only the `last` one of a step needs to communicate gradients."""
        yield

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale the gradients down to `max_norm`, and return the norm that they had, over all processes."""
        params = [h.param for h in self.holdings]
        norm = total_norm(params)
        if max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm

    def close(self) -> None:
        """Give back what the engine holds beyond its memory, and what keeps that from being freed."""
        if self.layers is not None:
            self.layers.close()

    def optimizer_bytes(self) -> int:
        """Return the bytes of optimizer state on this process."""
        return sum(p.tensor.numel() * p.tensor.element_size() for _, _, p in self.optimizer.pieces())

    def _token_loss_sum(self, ids: Tensor) -> Tensor:
        if self.device.type == "cuda":
            ids = ids.pin_memory()  # else the host would wait for the copy, and all that is before it
        ids = ids.to(self.device, non_blocking=True)
        mask = {} if self.mask is None else {"attention_mask": self.mask(ids)}
        # Padding lies on the right, where causal attention never looks from a token that counts.
        labels = ids.masked_fill(ids == self.pad_id, -100)
        loss_sum: Tensor = self.forward(input_ids=ids, labels=labels, **mask)
        return loss_sum
