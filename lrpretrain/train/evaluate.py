"""Validation loss over a fixed budget of tokens, and a line of the model's writing."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrpretrain.artifacts.metrics import perplexity
from lrpretrain.data.loader import Loader
from lrpretrain.data.tokenizer import Tokenizer
from lrpretrain.engine import Engine
from lrpretrain.errors import DataError, Stopped

SAMPLE_TOKENS = 24


class Evaluator:
    """Evaluates on the same tokens every time, on any number of processes.

    The budget is rounded up to whole global batches. The rows are read once and kept.
    """

    def __init__(self, loader: Loader, budget: int, micro_batch: int):
        self._loader = loader
        self._budget = budget
        self._micro_batch = micro_batch
        self._rows: list[npt.NDArray[np.integer]] | None = None
        self._targets = 0

    def evaluate(
        self, engine: Engine, flag: Callable[[], int] = int, biased: bool = False
    ) -> dict[str, float]:
        """Return the token-weighted mean loss (nats), perplexity and seconds. All processes must call it.

        Raises Stopped on all of them at the first global batch at which the `flag` of one is not 0. `biased`
        adds what the authors' scripts make of the same micro-batches; it takes a single process.
        """
        began = time.perf_counter()
        if self._rows is None:
            self._read(flag)
        micros: list[Tensor] = []
        losses: list[Tensor] = []
        for rows in self._rows or []:
            engine.procs.agree(flag())
            for ids in split(rows, self._micro_batch):
                micros.append(ids)
                losses.append(engine.loss_sum(ids).double())
        sums = torch.stack(losses)
        loss = float(engine.total(sums.sum())) / self._targets
        seconds = time.perf_counter() - began
        values = {
            "valid/loss": loss,
            "valid/ppl": perplexity(loss),
            "valid/targets": self._targets,
            "perf/eval_s": seconds,
        }
        if biased:
            assert engine.procs.n_procs == 1
            loss = biased_loss(sums.cpu(), torch.stack([_targets(ids, engine.pad_id) for ids in micros]))
            values |= {"valid/biased_loss": loss, "valid/biased_ppl": perplexity(loss)}
        return values

    def _read(self, flag: Callable[[], int]) -> None:
        self._rows, tokens = [], 0
        while tokens < self._budget and (batch := self._loader.next(flag)) is not None:
            if batch.flag:
                raise Stopped(batch.flag)
            self._rows.append(batch.ids.astype(np.int32))
            self._targets += batch.targets
            tokens += batch.tokens
        self._loader.close()
        if self._targets == 0:
            raise DataError("the validation documents give no tokens to predict. Give longer ones.")


def biased_loss(sums: Tensor, targets: Tensor) -> float:
    """Return the loss as the scripts of GaLore, GradNormLoRP and LORO report it.

    sums (k) of the losses of k batches, targets (k) that they are taken over. The scripts add up the means of
    the batches, whatever the number of their tokens, and divide by k + 1, since they count batches from 1:
    0.5 % too low for 180 batches. Batches of padding, which the scripts never see, are left out.
    """
    full = targets > 0
    return float((sums[full] / targets[full]).sum()) / (int(full.sum()) + 1)


def _targets(ids: Tensor, pad_id: int) -> Tensor:
    """Return how many of the ids (b, l) the loss is taken over."""
    return (ids[:, 1:] != pad_id).sum()


def split(rows: npt.NDArray[np.integer], micro_batch: int) -> list[Tensor]:
    """Cut rows of ids (b, l) into micro-batches of tensors."""
    return list(torch.from_numpy(rows.astype(np.int64)).split(micro_batch))


def continue_prompt(engine: Engine, tokenizer: Tokenizer, prompt: str) -> str:
    """Return the prompt and what is most likely after it, on one line. All processes must call it."""
    ids = tokenizer.encode(prompt)[:-1].tolist()  # without the eos
    for _ in range(SAMPLE_TOKENS):
        following = int(engine.next_logits(torch.tensor([ids])).argmax())
        if following == tokenizer.eos_id:
            break
        ids.append(following)
    return " ".join(tokenizer.decode(ids).split())
