"""How ids become rows, and what a row means to the loss and to the attention."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]


def pad(ids: Ids, seq_len: int, pad_id: int, eos_id: int) -> Ids:
    """Return a document as one row (seq_len,): cut with eos as its last id, or filled up with pad."""
    if len(ids) > seq_len:
        return np.append(ids[: seq_len - 1], eos_id)
    return np.pad(ids, (0, seq_len - len(ids)), constant_values=pad_id)


def cut(stream: Ids, seq_len: int) -> Iterator[tuple[Ids, Ids]]:
    """Yield full rows (seq_len,) from the front of a stream, each with what is left of it then."""
    for end in range(seq_len, len(stream) + 1, seq_len):
        yield stream[end - seq_len : end], stream[end:]


def document_mask(ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Return who may attend to whom, bool (b, 1, L, L): earlier positions of the same document.

    An eos belongs to the document that it ends.
    """
    ends = (ids == eos_id).long()
    document = ends.cumsum(-1) - ends  # (b, L): how many documents ended before
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()
