"""What a step asks of each process, by arithmetic alone: bytes of memory, and bytes sent.

N processes share the weights. Of the T numbers that are trained a process holds t, about T / N; of a matrix
(m, n), projected to (m, r), it holds m' lines. A number has w bytes in the weights that are updated (4 under
ZeRO) and c in the arithmetic.

Kept between steps:

    masters     t w
    copies      ZeRO-1, 2 T c, ZeRO-3 t c: what is computed with, where that is not the masters
    state       AdamW, LORO: 2 t w
                GaLore where the shards are (aligned): n r w of the basis, 2 m' r w of the moments
                GaLore at an owner: (n + 2 m) r w there, nothing elsewhere
                weightnorm besides: 4 float32 numbers for each row of W
                integers: 8 each

Kept for a time:

    gradients   t w; DDP T w; ZeRO-3 4 t and a copy of the larger of its two groups; BF16_Optimizer 4 T, and
                T c unless `immediate_grad_update`
    passes      forward and backward of FSDP2, with b numbers in a block, e outside of the blocks and h of
                these in the head, at the worse of two moments:
                at the second block (e + 2 b) c is gathered, one block ahead, (b + h) c are gradients, 4 b
                are being added up over the processes, and the gradients of the blocks above are there;
                at the end e c is gathered, e c are gradients, 4 e are being added up, and the gradients of
                the blocks are there. With several micro-batches all gradients are there at any time
    update      AdamW: 2 t w of the largest param group. LORO: 2 t w of all factors. GaLore, of the matrices
                of one shape, which are updated together: 3 m' r w of each (weightnorm 4) where the shards
                are; at owners 3 m n w (4) of each that is owned, and 2 t w of all

`peak` is what is kept, and the larger of passes and gradients + update: of an ordinary step, without
activations. Not in it: what a refresh or an exact step takes for its time; what is particular to the updates
of Adafactor and `lowrank_wn`; the whole gradients of `accumulate_unsharded`; under ZeRO the buckets, whole
gradients on the way to their process (1, 2), what is gathered and what is not cut for being small (3).

Sent by each process in a step, by rings: (N − 1) / N of the s bytes of an all-gather or a reduce-scatter,
twice that of an all-reduce.

    parameters  FSDP2: all-gathers for each micro-batch, two of b c for each block, one of e c. ZeRO-3: two
                of T c, one if T is within `stage3_max_reuse_distance`. ZeRO-1, 2: one of T c after the update
    gradients   FSDP2, ZeRO-3: a reduce-scatter of 4 T for each micro-batch (`accumulate_unsharded`: for each
                step), HSDP then an all-reduce of 4 t over the replicas. ZeRO-1: an all-reduce of 4 T for each
                step, ZeRO-2 for each micro-batch: DeepSpeed's buckets go to all processes, which is twice the
                reduce-scatter of Rajbhandari et al., arXiv 1910.02054, section 7. DDP: one of T w. ZeRO's 4
                is the size of `communication_data_type`
    update      At owners: t w to them (weightnorm 2 t w), m n w back from them, without what stays where it
                is: 2 (3) m n w / N on average. Aligned: r numbers (2 r) for each line that a flat buffer is
                cut in, and two for each row of W that is cut (weightnorm); where the cut runs across the
                projection an all-reduce of m r w (twice); else nothing
    refresh     Aligned: what optim/subspace.py adds up, over `refresh_every` steps. At owners: nothing.
                LORO: 3 (m + n) r w / N over `exact_every` steps

Scalars are not counted. The optimizers' terms follow from optim/ and sharding/placement.py; those of FSDP2
and DeepSpeed were measured (torch 2.13, deepspeed 0.19).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from lrpretrain.config import Config
from lrpretrain.engine import ds_config
from lrpretrain.optim import groups
from lrpretrain.optim.adafactor import moment_shapes
from lrpretrain.optim.galore import side_of
from lrpretrain.optim.subspace import RANDOMIZED_ITERATIONS
from lrpretrain.sharding import Holding, Tile, Tiles
from lrpretrain.sharding.placement import assign, choose
from lrpretrain.sharding.tiles import cut

BYTES = {"float32": 4, "bfloat16": 2, "fp32": 4, "bf16": 2}
WIDE = 4  # of what is summed in float32, whatever the weights are
INTEGER = 8
OUTSIDE = "outside of the blocks"
SHARDED: Any = object()  # stands for the process group

Amounts = npt.NDArray[Any]
"""A number for each of the N processes."""


@dataclass(frozen=True)
class Costs:
    """Bytes of each process; `state` by key, `sent` by purpose."""

    masters: Amounts
    copies: Amounts
    gradients: Amounts
    passes: Amounts
    state: dict[str, Amounts]
    update: Amounts
    sent: dict[str, Amounts]

    @property
    def peak(self) -> Amounts:
        kept = self.masters + self.copies + sum(self.state.values())
        return kept + np.maximum(self.passes, self.gradients + self.update)


def costs(config: Config, model: nn.Module, n_procs: int) -> Costs:
    """Return what a step of a configuration asks of the processes that share the weights.

    The configuration must have no problems; `model` is its own (`model.llama.configured`), without memory.
    """
    terms = _Terms(config, model, n_procs)
    return Costs(*terms.weights(), state=terms.state(), update=terms.update(), sent=terms.sent())


def describe(config: Config, model: nn.Module, n_procs: int) -> list[str]:
    """Return lines with the largest costs of any process."""
    found = costs(config, model, n_procs)
    memory = {"weights": found.masters + found.copies, "gradients": found.gradients}
    memory["optimizer state"] = sum(found.state.values(), 0 * found.masters)
    if config.engine.kind == "fsdp":
        memory |= {"forward and backward": found.passes, "update": found.update}
        memory["peak without activations"] = found.peak
    lines = {"GiB of a process, at most": memory}
    large = ("exp_avg", "basis", "drawn")
    lines["of its optimizer state"] = {k: size for k, size in found.state.items() if k.startswith(large)}
    if n_procs > 1:
        lines["GiB that it sends in a step"] = found.sent
    return [f"{title}: {', '.join(f'{k} {_gib(v)}' for k, v in of.items())}" for title, of in lines.items()]


def _gib(size: Amounts) -> str:
    return f"{size.max() / 2**30:.3g}"


@dataclass
class Matrix:
    """A matrix of a rule, (m, n) and projected to (m, r) as the rule sees it."""

    holding: Holding
    rank: int
    transposed: bool
    at_owner: bool
    owner: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.holding.shape[::-1] if self.transposed else self.holding.shape

    @property
    def across(self) -> bool:
        """Whether the cut runs across the projection: no process has a whole row of the (m, n)."""
        return self.holding.split == (0 if self.transposed else 1)

    @functools.cached_property
    def shared(self) -> int:
        """The lines of which no process has all, because a flat buffer is cut within them."""
        dim = self.holding.split or 0
        width = self.holding.shape[1 - dim]
        tiles = itertools.chain.from_iterable(self.holding.spread)
        return len({tile.offsets[dim] for tile in tiles if tile.sizes[1 - dim] < width})


class _Terms:
    """The terms of the sums above."""

    def __init__(self, config: Config, model: nn.Module, n_procs: int):
        self.optim, self.engine, self.n_procs = config.optim, config.engine, n_procs
        self.stage = ds_config.stage(config) if self.engine.kind == "zero" else 0
        self.ds = ds_config.load(config, n_procs) if self.stage else {}
        self.N = {"fsdp": n_procs // self.engine.replicas, "zero": n_procs}.get(self.engine.kind, 1)
        self.w, self.c = BYTES[config.precision.params], BYTES[config.precision.compute]
        self.micros = max(config.train.global_batch // (config.train.micro_batch * n_procs), 1)
        # BF16_Optimizer is what DeepSpeed takes for float32 gradients of bfloat16 weights at stage 1.
        wide = self.ds and self.ds["data_types"]["grad_accum_dtype"] == "fp32"
        self.bf16_optimizer = bool(self.stage == 1 and self.c == 2 and wide)

        params = dict(model.named_parameters())
        self.shapes = {name: tuple(p.shape) for name, p in params.items()}
        self.trained = [name for name, p in params.items() if p.requires_grad]
        spreads = dict(self._spreads()) if self.N > 1 else {}
        self.holdings = {}
        for name, shape in self.shapes.items():
            split, spread = spreads.get(name, (None, ()))
            where = (spread, split, SHARDED if spread else None, self.stage not in (1, 2))
            self.holdings[name] = Holding(name, params[name], shape, (Tile.whole(shape),), *where)
        self.held = {name: self._along(h) for name, h in self.holdings.items()}
        # weightnorm looks at W: the owner gets it as well, and its products are summed as well.
        self.reads = int(self.optim.rule == "gradnormlorp" and self.optim.mode == "weightnorm")
        self.batches = self._batches() if self.optim.rule in groups.PROJECTED else []
        projected = {x.holding.name for batch in self.batches for x in batch}
        self.regular = [name for name in self.trained if name not in projected]
        self.factors = [name for name in self.trained if name.endswith((".weight_in", ".weight_out"))]

    def weights(self) -> tuple[Amounts, Amounts, Amounts, Amounts]:
        """Return masters, copies, gradients and passes."""
        T, t = self._whole(self.trained), self._own(self.trained)
        if self.engine.kind == "fsdp":
            return self._own(self.shapes) * self.w, 0 * t, t * self.w, self._passes()
        if not self.stage:
            return self._whole(self.shapes) * self.w, 0 * T, T * self.w, T * self.w
        copies = self._own(self.shapes) if self.stage == 3 else self._whole(self.shapes)
        projected = groups.projected(self.shapes, self.optim)
        by_group = [self._own(n for n in self.trained if (n in projected) == kind) for kind in (False, True)]
        gradients = 4 * (t + np.maximum(*by_group)) if self.stage == 3 else 4 * t
        if self.bf16_optimizer:
            gradients = T * (4 if self.ds["bf16"].get("immediate_grad_update") else 4 + self.c)
        return 4 * t, copies * self.c, gradients, gradients

    def state(self) -> dict[str, Amounts]:
        """Return the optimizer state by key; `drawn` are random bases, which are kept and not stored."""
        state: dict[str, Amounts] = defaultdict(lambda: np.zeros(self.N, np.int64))
        for name in self.regular:
            for key, size in self._regular_state(name).items():
                state[key] += size
        for x in itertools.chain.from_iterable(self.batches):
            whose = slice(None) if x.owner is None else x.owner
            for key, (numbers, size) in self._matrix_state(x).items():
                state[key][whose] += numbers * size
        return dict(state)

    def update(self) -> Amounts:
        """Return what an ordinary update takes for its time."""
        ranks = groups.matched(self.shapes, self.optim) if self.optim.rule == "adamw" else {}
        alike: dict[Any, list[str]] = defaultdict(list)
        for name in self.regular:
            alike[name in self.factors or ranks.get(name)].append(name)
        needs = [2 * self._own(names) * self.w for names in alike.values()]
        for batch in self.batches:
            need = np.zeros(self.N, np.int64)
            for x in batch:
                self._add_need(x, need)
            needs.append(need * self.w)
        return np.max(needs, axis=0)

    def sent(self) -> dict[str, Amounts]:
        """Return what is sent in a step, by purpose."""
        parameters, gradients = self._communicated()
        update, refresh = np.zeros(self.N), np.zeros(self.N)
        ring = 2 * (self.N - 1) / self.N
        for x in itertools.chain.from_iterable(self.batches):
            if x.owner is not None:
                update += self._exchanged(x.holding, x.owner, 1 + self.reads)
            elif x.holding.group is not None:
                update += ring * self._summed_in_update(x)
                refresh += ring * self._summed_in_refresh(x) / self.optim.refresh_every
        for h, owner in self._factors_with_owners():
            refresh += self._exchanged(h, owner, 2) / self.optim.exact_every
        names = ("parameters", "gradients", "update", "refresh")
        amounts = (parameters, gradients, update, refresh)
        return {name: np.broadcast_to(amount, self.N) for name, amount in zip(names, amounts, strict=True)}

    # What lies where.

    def _spreads(self) -> Iterator[tuple[str, tuple[int, tuple[Tiles, ...]]]]:
        """Yield the dimension along which each parameter is cut, and what each process has of it."""
        if self.stage in (1, 2):
            for name, ends in self._in_buffers():
                yield name, (0, tuple(cut(self.shapes[name], *pair) for pair in itertools.pairwise(ends)))
            return
        columns = groups.projected_on_the_left(self.shapes, self.optim) if self.engine.shard_columns else ()
        for name, shape in self.shapes.items():
            if self.engine.kind == "fsdp" and name in columns and shape[1] % self.N == 0:
                width = shape[1] // self.N
                yield name, (1, tuple((Tile((0, k * width), (shape[0], width)),) for k in range(self.N)))
            else:
                yield name, (0, _evenly(shape, 1 if self.stage == 3 else math.prod(shape[1:]), self.N))

    def _in_buffers(self) -> Iterator[tuple[str, list[int]]]:
        """Yield where ZeRO-1 and 2 cut each parameter: the rule's matrices lie in a buffer of their own."""
        projected = groups.projected(self.shapes, self.optim)
        robin = self.ds["zero_optimization"].get("round_robin_gradients") and not self.bf16_optimizer
        for kind in (False, True):
            names = [name for name in self.trained if (name in projected) == kind]
            if robin:
                names = [name for first in range(self.N) for name in names[first :: self.N]]
            numels = [math.prod(self.shapes[name]) for name in names]
            part = -(-sum(numels) // (2 * self.N)) * 2  # the buffer is padded to a multiple of 2 N
            for name, numel, end in zip(names, numels, itertools.accumulate(numels), strict=True):
                yield name, [min(max(k * part - end + numel, 0), numel) for k in range(self.N + 1)]

    def _batches(self) -> list[list[Matrix]]:
        """Return the matrices that the rule projects, together those that are updated together."""
        ranks = groups.projection_ranks({name: self.shapes[name] for name in self.trained}, self.optim)
        loads, found = [0.0] * self.N, list[list[Matrix]]()
        for rank in sorted(set(ranks.values())):
            batches = defaultdict[Any, list[Matrix]](list)
            for h in (self.holdings[name] for name in ranks if ranks[name] == rank):
                x = self._matrix(h, rank)
                batches[h.shape, h.split, x.at_owner or h.spread].append(x)
            owned = [x for batch in batches.values() for x in batch if x.at_owner]
            numbers = [self._numbers(x) for x in owned]
            for x, owner in zip(owned, assign([x.holding for x in owned], numbers, loads), strict=True):
                x.owner = owner
            found += batches.values()
        return found

    def _matrix(self, h: Holding, rank: int) -> Matrix:
        optim = self.optim
        transposed = side_of(h.shape, optim.side) == "left"
        place = choose(h, int(transposed), rank, optim.side == "full" or optim.subspace == "svd")[0]
        if optim.placement != "auto" and h.group is not None:
            place = optim.placement
        return Matrix(h, rank, transposed, place == "owner")

    def _factors_with_owners(self) -> Iterator[tuple[Holding, int]]:
        """Yield LORO's factors and the owners of their exact steps, if there are such steps."""
        ins = [self.holdings[name] for name in self.factors if name.endswith("in")]
        outs = [self.holdings[h.name.removesuffix("in") + "out"] for h in ins]
        if outs and outs[0].group is not None and self.optim.exact_every:
            sizes = ((a.shape[0] + b.shape[0], a.shape[1]) for a, b in zip(ins, outs, strict=True))
            owners = assign(outs, [(mn + 8 * r) * r**2 for mn, r in sizes], [0.0] * self.N)
            for *pair, owner in zip(ins, outs, owners, strict=True):
                yield from ((h, owner) for h in pair)

    def _along(self, h: Holding, dim: int | None = None) -> Amounts:
        """Return how many numbers of a parameter each process has, or lines along a dimension."""
        if dim is not None and dim != h.split:
            return np.full(self.N, h.shape[dim])
        spread = h.spread or (h.tiles,) * self.N
        return np.array([sum(t.numel if dim is None else t.sizes[dim] for t in tiles) for tiles in spread])

    def _own(self, names: Iterable[str]) -> Amounts:
        """Return how many numbers of the parameters each process has."""
        return sum((self.held[name] for name in names), np.zeros(self.N, np.int64))

    def _whole(self, names: Iterable[str]) -> Amounts:
        """Return how many numbers the parameters have, for each process."""
        return np.full(self.N, sum(math.prod(self.shapes[name]) for name in names))

    # Of the optimizer.

    def _regular_state(self, name: str) -> dict[str, Any]:
        """Return the bytes of state of a parameter that is not projected, by key."""
        shape, moment = self.shapes[name], self.held[name] * self.w
        if self.optim.base == "adafactor":
            return {"step": INTEGER} | {key: WIDE * math.prod(s) for key, s in _factored(shape).items()}
        state = {"step": INTEGER, "exp_avg": moment, "exp_avg_sq": moment}
        if self.optim.rule == "loro":
            state["updates"] = INTEGER
        if self.optim.mode == "lowrank_wn":
            rows = WIDE * (shape[0] if len(shape) > 1 else 1)
            state |= {"v": moment, "magnitude_exp_avg": rows, "magnitude_exp_avg_sq": rows}
        return state

    def _matrix_state(self, x: Matrix) -> dict[str, tuple[Any, int]]:
        """Return (numbers, bytes of one) of a matrix's state by key: of each process, or of its owner."""
        (m, n), r, optim = x.shape, x.rank, self.optim
        lines = m if x.at_owner else self._along(x.holding, int(x.transposed))
        rows = x.holding.shape[0] if x.at_owner else self._along(x.holding, 0)
        state: dict[str, tuple[Any, int]] = dict.fromkeys(("side", "age", "step", "phase"), (1, INTEGER))
        moments = {"exp_avg": lines * r, "exp_avg_sq": lines * r}
        if optim.side == "full":
            moments = {"exp_avg": r * r, "exp_avg_sq": r * r}
            state["basis_left"] = m * r, self.w
        if optim.base == "adafactor":
            factored = _factored((r if optim.side == "full" else m, r))
            state |= {key: (math.prod(shape), WIDE) for key, shape in factored.items()}
        else:
            state |= {key: (numbers, self.w) for key, numbers in moments.items()}
        if optim.side == "full" or optim.subspace != "random":
            state["basis"] = n * r, self.w
        elif optim.placement != "seeded":
            state["drawn"] = n * r, self.w
        if optim.rule == "gradnormlorp" and optim.mode != "dora":
            vectors = ("magnitude", "norm") if self.reads else ()
            for key in (*vectors, "magnitude_exp_avg", "magnitude_exp_avg_sq"):
                state[key] = rows, WIDE
        if optim.mode == "lowrank_wn":
            state["v"] = m * n, self.w
        return state

    def _numbers(self, x: Matrix) -> float:
        """Return what owners are chosen by: numbers of state, without what all matrices have alike."""
        apart = ("step", "phase", "drawn")
        return float(sum(numbers for key, (numbers, _) in self._matrix_state(x).items() if key not in apart))

    def _add_need(self, x: Matrix, need: Amounts) -> None:
        """Add what a matrix takes for the time of its update, in numbers, to that of each process."""
        if x.owner is None:
            need += (3 + self.reads) * x.rank * self._along(x.holding, int(x.transposed))
            return
        held, numel = self.held[x.holding.name], math.prod(x.shape)
        travels = held[x.owner] < numel
        need += held * (2 if travels else 1)
        if travels:
            need[x.owner] += numel * (4 if self.reads or x.holding.split == 1 else 3)
        else:
            need[x.owner] += numel * (1 - self.reads)

    def _exchanged(self, h: Holding, owner: int, kinds: int) -> Amounts:
        """Return the bytes that bring `kinds` tensors of a parameter to its owner, and one back."""
        held, numel = self.held[h.name], math.prod(h.shape)
        if held[owner] == numel:
            return 0 * held
        sent = kinds * held
        sent[owner] = numel - held[owner]
        return sent * self.w

    def _product(self, x: Matrix, k: int) -> int:
        """Return the numbers that are added up for the product of a matrix with an (n, k)."""
        return x.shape[0] * k if x.across else x.shared * k

    def _summed_in_update(self, x: Matrix) -> int:
        """Return the bytes that the processes add up for a matrix in an ordinary step."""
        rows = x.holding.shape[0] if x.holding.split == 1 else x.shared
        return (1 + self.reads) * self._product(x, x.rank) * self.w + 2 * self.reads * rows * WIDE

    def _summed_in_refresh(self, x: Matrix) -> int:
        """Return the bytes that the processes add up for a matrix in a refresh, beyond an ordinary step."""
        (m, n), r = x.shape, x.rank
        product, inner = self._product(x, r) * self.w, 0 if x.across else r * r * WIDE
        iterations = {"warm": 1, "randomized": RANDOMIZED_ITERATIONS}.get(self.optim.subspace, 0)
        found = iterations * (product + n * r * self.w) + (product + inner if iterations else 0)
        if self.optim.subspace == "svd" or (self.optim.subspace == "gram" and (x.across or x.shared)):
            found = m * n * self.w
        elif self.optim.subspace == "gram":
            found = n * n * WIDE
        return found + product + inner + WIDE  # what is measured: energy

    # Of the engine.

    def _passes(self) -> Amounts:
        """Return what FSDP2's forward and backward take."""
        gathered, reduced = self._units(self.shapes), self._units(self.trained)
        head = self._units(name for name in self.trained if "embed_tokens" not in name)
        e, e_reduced, h = (units.pop(OUTSIDE, 0) for units in (gathered, reduced, head))
        b, b_reduced = max(gathered.values()), max(reduced.values())
        blocks = [name for name in self.trained if _unit(name) != OUTSIDE]
        later = [name for name in blocks if _unit(name) not in list(gathered)[:2]]
        done = self._own(later), self._own(blocks)
        if self.micros > 1:  # the gradients of the micro-batches before
            done = (self._own(self.trained) + b_reduced // self.N,) * 2
        second_block = (e + 2 * b + b_reduced + h) * self.c + b_reduced * WIDE + done[0] * self.w
        rest = (e + e_reduced) * self.c + e_reduced * WIDE + done[1] * self.w
        return np.maximum(second_block, rest)

    def _units(self, names: Iterable[str]) -> dict[str, int]:
        """Return the numbers of FSDP2's units: every process's shard is as large as the largest."""
        units: dict[str, int] = defaultdict(int)
        for name in names:
            units[_unit(name)] += int(self.held[name].max()) * self.N
        return units

    def _communicated(self) -> tuple[Any, Any]:
        """Return what is sent of parameters and of gradients."""
        ring, T = (self.N - 1) / self.N, sum(math.prod(self.shapes[name]) for name in self.trained)
        if self.engine.kind == "fsdp":
            gathered, reduced = self._units(self.shapes), sum(self._units(self.trained).values()) * WIDE
            numbers = 2 * sum(gathered.values()) - gathered[OUTSIDE]
            replicas = 2 * (self.engine.replicas - 1) / self.engine.replicas
            times = 1 if self.engine.accumulate_unsharded else self.micros
            return self.micros * ring * numbers * self.c, times * (ring + replicas / self.N) * reduced
        if not self.stage:
            return 0, 2 * (self.n_procs - 1) / self.n_procs * T * self.w
        size = BYTES[self.ds["communication_data_type"]]
        if self.stage == 3:
            everything = sum(math.prod(shape) for shape in self.shapes.values())
            far = everything > self.ds["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
            numbers = everything * (2 if far else 1)
            return self.micros * ring * numbers * self.c, self.micros * ring * T * size
        return ring * T * self.c, (1 if self.stage == 1 else self.micros) * 2 * ring * T * size


_factored = functools.partial(moment_shapes, hp={"beta1": None})


@functools.cache
def _evenly(shape: tuple[int, ...], line: int, n_procs: int) -> tuple[Tiles, ...]:
    """Return the tiles of each process: as many lines of so many numbers, the last processes fewer."""
    numel = math.prod(shape)
    part = -(-numel // (line * n_procs)) * line
    return tuple(cut(shape, min(k * part, numel), min((k + 1) * part, numel)) for k in range(n_procs))


def _unit(name: str) -> str:
    """Return the block that a parameter belongs to, which FSDP2 gathers as a whole."""
    block = re.match(r"model\.layers\.\d+\.", name)
    return block[0] if block else OUTSIDE
