"""A seeded permutation that takes no memory."""

from __future__ import annotations

import hashlib
import math
import struct

_WORD = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15


class Shuffle:
    """The numbers 0 … n-1 in an order that is a function of `key` alone.

    An element is computed when it is asked for, so that millions of documents cost nothing and a
    resume starts anywhere; and no library's generator is involved whose stream may change. It is a
    Feistel network on a grid of about √n × √n cells: each half is shifted by a hash of the other,
    which can be undone, hence a permutation; what falls on a cell beyond n is sent through again.
    """

    def __init__(self, n: int, *key: int | str):
        self.n = n
        self._rows = math.isqrt(max(n - 1, 0)) + 1
        self._columns = -(-n // self._rows)
        words = struct.unpack("<8Q", hashlib.blake2b(repr(key).encode()).digest())
        self._rounds = list(zip(words[::2], words[1::2], strict=True))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(index)
        while True:
            row, column = divmod(index, self._columns)
            for first, second in self._rounds:
                row = (row + _hash(column ^ first)) % self._rows
                column = (column + _hash(row ^ second)) % self._columns
            index = row * self._columns + column
            if index < self.n:
                return index


def _hash(word: int) -> int:
    word = word * _ODD & _WORD
    word = (word ^ word >> 32) * _ODD & _WORD
    return word >> 32
