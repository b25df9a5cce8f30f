"""What a step asks of each process, by arithmetic alone: bytes of memory, and bytes sent.

N processes share the weights. Of the T numbers that are trained a process holds t, about T / N; of a matrix
(m, n), projected to (m, r), it holds m' lines. A number has w bytes in the weights that are updated (4 under
ZeRO), c in the arithmetic, s in the moments (int8: 1, and 4 more for every 128 of a row) and p in the basis.

Kept between steps:

    masters     t w
    copies      ZeRO-1, 2 T c, ZeRO-3 t c: what is computed with, where that is not the masters
    state       AdamW, LORO: 2 t s
                GaLore where the shards are (aligned): n r p of the basis, 2 m' r s of the moments; `seeded`
                without the basis
                GaLore at an owner: n r p + 2 m r s there, nothing elsewhere
                weightnorm besides: 4 float32 numbers for each row of W
                integers: 8 each

Kept for a time:

    gradients   t w; DDP T w; ZeRO-3 4 t and a copy of the larger of its two groups; BF16_Optimizer 4 T, and
                T c unless `immediate_grad_update`
    passes      forward and backward of FSDP2, with b numbers in a block, e outside of the blocks and h of
                these in the head, at the worst of four moments:
                at the second block (e + 2 b) c is gathered, one block ahead, (b + h) c are gradients, d b
                are being added up over the processes, and the gradients of the blocks above are there;
                `prefetch_blocks` gathers more of them, and without `reshard_after_forward` all are there;
                when it is added up itself, its d b / N arrive, and it is not gathered any more;
                at the end e c are gradients and d e are being added up, then d e / N arrive and only h c are
                left; the gradients of the blocks are there.
                With several micro-batches all gradients are there at any time. `gloo`, on CPUs, copies the
                d b or d e that it adds up.
                Layer by layer (`per_layer`), with one micro-batch, no gradients of other blocks are there; a
                block is updated beside its d b, and what is outside of the blocks beside d e
    update      AdamW: 2 t w of the largest param group. LORO: 2 t w of all factors, 4 t w if they decay.
                GaLore, of the matrices of one shape, which are updated together: 3 m' r w of each (weightnorm
                4), and n r w of bases that are random or of another dtype; with moments of another dtype
                2 m' r w, and IN_PARTS for 2^22 of them. At owners the same with m, and 2 m n w of each that
                is owned; before and after it 2 m n w (weightnorm 4) and what is exchanged: t w (2 t w) before
                and 2 t w after. Decay: t w. Layer by layer the same, and gradients, of one block, or of one
                parameter outside of the blocks

`peak` is what is kept, and the larger of passes and gradients + update: of an ordinary step, without
activations. Not in it: what a refresh or an exact step takes for its time; what is particular to the updates
of Adafactor and `lowrank_wn`; the whole gradients of `accumulate_unsharded`; under ZeRO the buckets, whole
gradients on the way to their process (1, 2), what is gathered and what is not cut for being small (3).

Sent by each process in a step, by rings: (N − 1) / N of the bytes of an all-gather or a reduce-scatter,
twice that of an all-reduce.

    parameters  FSDP2: all-gathers for each micro-batch, two of b c for each block (one without
                `reshard_after_forward`), one of e c. ZeRO-3: two of T c, one if T is within
                `stage3_max_reuse_distance`. ZeRO-1, 2: one of T c after the update
    gradients   FSDP2, ZeRO-3: a reduce-scatter of d T for each micro-batch (`accumulate_unsharded`: for each
                step), HSDP then an all-reduce of d t over the replicas. ZeRO-1: an all-reduce of d T for each
                step, ZeRO-2 for each micro-batch: DeepSpeed's buckets go to all processes, which is twice the
                reduce-scatter of Rajbhandari et al., arXiv 1910.02054, section 7. DDP: one of T w. d are the
                bytes of `precision.reduce`, ZeRO's of `communication_data_type`
    update      At owners: t w to them (weightnorm 2 t w), m n w back from them, without what stays where it
                is: 2 (3) m n w / N on average. Aligned: r numbers (2 r) for each line that a flat buffer is
                cut in, and two for each row of W that is cut (weightnorm); where the cut runs across the
                projection an all-reduce of m r w (twice); else nothing
    refresh     Aligned: what optim/subspace.py adds up, over `refresh_every` steps. At owners: nothing.
                LORO: 3 (m + n) r w / N over `exact_every` steps

Not counted are single numbers for a whole model, and bases that replicas (HSDP) agree on. The optimizers'
terms follow from optim/ and sharding/placement.py; those of FSDP2 and DeepSpeed were measured (torch 2.13,
deepspeed 0.19).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lrpretrain.config import Config
from lrpretrain.engine.layers import unit_of
from lrpretrain.optim import groups
from lrpretrain.optim.adafactor import moment_shapes
from lrpretrain.optim.adamw import PART
from lrpretrain.optim.moments import float_dtype, stored
from lrpretrain.optim.subspace import RANDOMIZED_ITERATIONS
from lrpretrain.sharding import Holding
from lrpretrain.sharding.algebra import CHUNK_BYTES
from lrpretrain.sharding.placement import assign
from lrpretrain.train.layout import Amounts, Layout, Matrix

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = 4  # of what is summed in float32, whatever the weights are
INTEGER = 8
OUTSIDE = "outside of the blocks"
# Moments of another dtype than the parameters' are updated part by part: bytes for each number of a part, if
# it is the only one, and if it is one of several.
IN_PARTS = {"float32": (16, 20), "bfloat16": (16, 20), "int8": (37, 37)}


@dataclass(frozen=True)
class Costs:
    """Bytes of each process; `state` by key, `sent` by purpose."""

    masters: Amounts
    copies: Amounts
    gradients: Amounts
    passes: Amounts
    update: Amounts
    state: dict[str, Amounts]
    sent: dict[str, Amounts]

    @property
    def weights(self) -> Amounts:
        return self.masters + self.copies

    @property
    def kept(self) -> Amounts:
        return sum(self.state.values(), np.zeros_like(self.masters))

    @property
    def peak(self) -> Amounts:
        return self.weights + self.kept + np.maximum(self.passes, self.gradients + self.update)


def costs(config: Config, model: nn.Module, n_procs: int, gloo: bool = False) -> Costs:
    """Return what a step of a configuration asks of the processes that share the weights.

    The configuration must have no problems; `model` is its own (`model.llama.configured`), without memory.
    With `gloo` it is what the processes talk by, as they do on CPUs.
    """
    terms = _Terms(config, model, n_procs, gloo)
    return Costs(*terms.weights(), state=terms.state(), sent=terms.sent())


def describe(config: Config, model: nn.Module, n_procs: int) -> list[str]:
    """Return lines with the largest costs of any process."""
    found = costs(config, model, n_procs)
    memory = {"weights": found.weights, "gradients": found.gradients, "optimizer state": found.kept}
    if config.engine.kind in ("local", "fsdp"):
        memory |= {"forward and backward": found.passes, "update": found.update}
        memory["peak without activations"] = found.peak
    large = {key: size for key, size in found.state.items() if size.max() > found.kept.max() / 1000}
    lines = {"GiB of a process, at most": memory, "of its optimizer state": large}
    if n_procs > 1:
        lines["GiB that it sends in a step"] = found.sent
    return [f"{title}: {', '.join(f'{k} {_gib(v)}' for k, v in of.items())}" for title, of in lines.items()]


COLUMNS = ("weights", "gradients", "state", "sent")


def row(config: Config, model: nn.Module, n_procs: int) -> list[str]:
    """Return what `COLUMNS` names, the largest of any process, in GiB; what is sent is that of a step."""
    found = costs(config, model, n_procs)
    sent = sum(found.sent.values(), np.zeros(1))
    return [_gib(amounts) for amounts in (found.weights, found.gradients, found.kept, sent)]


def _gib(size: Amounts) -> str:
    return f"{size.max() / 2**30:.3g}"


class _Terms:
    """The terms of the sums above."""

    def __init__(self, config: Config, model: nn.Module, n_procs: int, gloo: bool):
        self.gloo = gloo
        self.at = at = Layout(config, model, n_procs)
        self.N, self.optim, self.engine = at.N, config.optim, config.engine
        self.own = DTYPES[config.precision.params]
        self.w, self.c = self.own.itemsize, DTYPES[config.precision.compute].itemsize
        self.d = DTYPES[config.precision.reduce].itemsize
        self.micros = max(config.train.global_batch // (config.train.micro_batch * n_procs), 1)
        # weightnorm looks at W: the owner gets it as well, and its products are summed as well.
        self.reads = int(self.optim.rule == "gradnormlorp" and self.optim.mode == "weightnorm")
        self.batches = self._with_owners()
        matrices = {x.holding.name for batch in self.batches for x in batch}
        self.regular = [name for name in at.trained if name not in matrices]
        self.factors = [name for name in at.trained if name.endswith((".weight_in", ".weight_out"))]

    def weights(self) -> tuple[Amounts, Amounts, Amounts, Amounts, Amounts]:
        """Return masters, copies, gradients, passes and update."""
        at = self.at
        T, t = at.whole(at.trained), at.own(at.trained)
        if not at.stage:
            gradients, update = self._at_update()
            passes = self._passes() if self.engine.kind == "fsdp" else gradients
            return at.own(at.shapes) * self.w, 0 * t, gradients, passes, update
        update = self._update(at.trained)
        copies = at.own(at.shapes) if at.stage == 3 else at.whole(at.shapes)
        by_group = [at.own(n for n in at.trained if (n in at.projected) == kind) for kind in (False, True)]
        gradients = WIDE * (t + np.maximum(*by_group)) if at.stage == 3 else WIDE * t
        if at.bf16_optimizer:
            gradients = T * (WIDE if at.ds["bf16"].get("immediate_grad_update") else WIDE + self.c)
        return WIDE * t, copies * self.c, gradients, gradients, update

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

    # Of the optimizer.

    def _update(self, names: Collection[str]) -> Amounts:
        """Return what an ordinary update of these parameters takes for its time."""
        ranks = groups.matched(self.at.shapes, self.optim) if self.optim.rule == "adamw" else {}
        alike: dict[Any, list[str]] = defaultdict(list)
        for name in self.regular:
            if name in names:
                alike[name in self.factors or ranks.get(name)].append(name)
        needs = [self._regular_need(alike_names) for alike_names in alike.values()]
        batches = [
            chosen for batch in self.batches if (chosen := [x for x in batch if x.holding.name in names])
        ]
        needs += [self._matrices_need(part) for batch in batches for part in self._parts(batch)]
        if self.optim.weight_decay:
            needs += [self.at.own(x.holding.name for x in batch) * self.w for batch in batches]
        return np.max(needs, axis=0)

    def _at_update(self) -> tuple[Amounts, Amounts]:
        """Return gradients, and what an update takes: layer by layer where both together are the most."""
        if not self.optim.per_layer:
            return self.at.own(self.at.trained) * self.w, self._update(self.at.trained)
        found = np.array([amounts for _, *amounts in self._units_at_update()])  # (units, 2, N)
        worst = found.sum(1).argmax(0)
        gradients, update = found[worst, :, np.arange(self.N)].T
        return gradients, update

    def _units_at_update(self) -> Iterator[tuple[bool, Amounts, Amounts]]:
        """Yield of each unit of updates, in their order, whether it is a block, gradients and update."""
        at, sharded, units = self.at, self.engine.kind == "fsdp", defaultdict[str, list[str]](list)
        for name in reversed(at.trained):
            units[unit_of(name)].append(name)
        outside = [name for name in at.trained if _unit(name) == OUTSIDE]
        left = at.own(at.trained)
        for unit in sorted(units, key=lambda unit: sharded and unit in outside):
            own = at.own(units[unit])
            arrived = at.own(outside) if sharded and unit in outside else own  # FSDP2's root has one buffer
            there = arrived if self.micros == 1 else left + arrived * sharded
            yield unit not in outside, there * self.w, self._update(units[unit])
            left = left - own

    def _with_owners(self) -> list[list[Matrix]]:
        """Return the matrices that are updated together; owners are chosen rank by rank."""
        loads, found = [0.0] * self.N, list[list[Matrix]]()
        for batches in self.at.batches():
            owned = [x for batch in batches for x in batch if x.at_owner]
            numbers = [self._numbers(x) for x in owned]
            for x, owner in zip(owned, assign([x.holding for x in owned], numbers, loads), strict=True):
                x.owner = owner
            found += batches
        return found

    def _factors_with_owners(self) -> Iterator[tuple[Holding, int]]:
        """Yield LORO's factors and the owners of their exact steps, if there are such steps."""
        ins = [self.at.holdings[name] for name in self.factors if name.endswith("in")]
        outs = [self.at.holdings[h.name.removesuffix("in") + "out"] for h in ins]
        if self.optim.rule == "loro" and outs and outs[0].group is not None and self.optim.exact_every:
            sizes = ((a.shape[0] + b.shape[0], a.shape[1]) for a, b in zip(ins, outs, strict=True))
            owners = assign(outs, [(mn + 8 * r) * r**2 for mn, r in sizes], [0.0] * self.N)
            for *pair, owner in zip(ins, outs, owners, strict=True):
                yield from ((h, owner) for h in pair)

    def _regular_state(self, name: str) -> dict[str, Any]:
        """Return the bytes of state of a parameter that is not projected, by key."""
        shape, held = self.at.shapes[name], self.at.held[name]
        if "adafactor" in (self.optim.rule, self.optim.base):
            parts = _factored(shape) | ({"exp_avg": shape} if self.optim.momentum else {})
            return {"step": INTEGER} | {key: WIDE * math.prod(s) for key, s in parts.items()}
        moment = held * float_dtype(self.optim.moments, self.own).itemsize
        if self.optim.rule == "sgd":
            return {"momentum": moment} if self.optim.momentum else {}
        if (self.optim.rule, self.optim.moments, len(shape)) == ("adamw", "int8", 2):
            kept = stored("int8", shape[1], self.own)
            sizes = {key: shape[0] * width * dtype.itemsize for key, (width, dtype) in kept.items()}
            return {"step": INTEGER} | sizes
        state = {"step": INTEGER, "exp_avg": moment, "exp_avg_sq": moment}
        if self.optim.rule in groups.FACTORED:
            state["updates"] = INTEGER
        if self.optim.mode == "lowrank_wn":
            rows = WIDE * (shape[0] if len(shape) > 1 else 1)
            state |= {"v": held * self.w, "magnitude_exp_avg": rows, "magnitude_exp_avg_sq": rows}
        return state

    def _matrix_state(self, x: Matrix) -> dict[str, tuple[Any, int]]:
        """Return (numbers, bytes of one) of a matrix's state by key: of each process, or of its owner."""
        (m, n), r, optim, own = x.shape, x.rank, self.optim, self.own
        lines = m if x.at_owner else self.at.along(x.holding, int(x.transposed))
        rows = x.holding.shape[0] if x.at_owner else self.at.along(x.holding, 0)
        basis = float_dtype(optim.basis, own).itemsize
        state: dict[str, tuple[Any, int]] = dict.fromkeys(("side", "age", "step", "phase"), (1, INTEGER))
        if optim.side == "full":
            lines = r
            state["basis_left"] = m * r, basis
        if optim.base == "adafactor":
            whole = (r if optim.side == "full" else m, r)
            factored = _factored(whole) | ({"exp_avg": whole} if optim.momentum else {})
            state |= {key: (math.prod(shape), WIDE) for key, shape in factored.items()}
        else:
            kept = stored(optim.moments, r, own)
            state |= {key: (lines * width, dtype.itemsize) for key, (width, dtype) in kept.items()}
        if optim.side == "full" or optim.subspace != "random":
            state["basis"] = n * r, basis
        elif optim.placement != "seeded":
            state["drawn"] = n * r, basis
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

    def _regular_need(self, names: list[str]) -> Amounts:
        """Return what the parameters of a group that are not projected take for the time of their update."""
        t = self.at.own(names) * self.w
        if names[0] in self.factors:  # directions, steps, and what decays
            return (4 if self.optim.weight_decay else 2) * t
        if (kind := self._other_moments()) is None or kind == "int8":
            return 2 * t
        largest = np.max([self.at.held[name] for name in names], axis=0)
        decayed = t * bool(self.optim.weight_decay)
        return t + np.maximum(_of_part(kind, np.minimum(largest, PART), largest), decayed)

    def _parts(self, batch: list[Matrix]) -> list[list[Matrix]]:
        """Return the matrices of a batch whose exchange is one."""
        h = batch[0].holding
        size = math.prod(h.shape) * self.w
        count = max(1, CHUNK_BYTES * self.N // size) if batch[0].at_owner else len(batch)
        return [batch[i : i + count] for i in range(0, len(batch), count)]

    def _matrices_need(self, part: list[Matrix]) -> Amounts:
        """Return what matrices that are updated together take for the time of their update."""
        x, reads = part[0], self.reads
        (m, n), r, h = x.shape, x.rank, x.holding
        if x.at_owner:
            b, lines, columns = self._owned(part), np.full(self.N, m), np.full(self.N, n)
        else:
            b, dims = np.full(self.N, len(part)), (int(x.transposed), int(not x.transposed))
            lines, columns = (self.at.along(h, dim) for dim in dims)
        R, P = b * lines * r * self.w, b * n * r * self.w
        need = (3 + reads) * R
        if reads:
            stretched = b * columns * r * self.w if x.transposed else 0
            need = np.maximum(need + stretched, 2 * R + lines * columns * WIDE * (b > 0))
        if (kind := self._other_moments()) is not None:
            entry = np.maximum(lines * r, 1)
            need = np.maximum(need, 2 * R + _of_part(kind, entry * np.clip(PART // entry, 1, b), entry * b))
        basis = float_dtype(self.optim.basis, self.own)
        if self.optim.subspace == "random" or basis != self.own:
            drawn = P // self.w * basis.itemsize * (self.optim.placement == "seeded")
            need = np.maximum(need, drawn) + P
        if not x.at_owner:
            return need
        travelling = [x for x in part if self.at.held[x.holding.name][x.owner] < m * n]
        held = sum((self.at.held[x.holding.name] for x in travelling), 0 * b) * self.w
        all_, moving = b * m * n * self.w, self._owned(travelling) * m * n * self.w
        new = moving if reads else all_  # what is read is updated in place
        gather = (1 + reads) * (held + 2 * moving)
        scatter = new + moving * (1 + (h.split == 1)) + 2 * held
        return np.max([gather, moving + new + need, scatter], axis=0)

    def _owned(self, matrices: list[Matrix]) -> Amounts:
        """Return how many of the matrices each process owns."""
        return np.bincount([x.owner for x in matrices if x.owner is not None], minlength=self.N)

    def _other_moments(self) -> str | None:
        """Return what moments are stored in, where that is not the dtype of the parameters."""
        kind = self.optim.moments
        return None if kind != "int8" and float_dtype(kind, self.own) == self.own else kind

    def _exchanged(self, h: Holding, owner: int, kinds: int) -> Amounts:
        """Return the bytes that bring `kinds` tensors of a parameter to its owner, and one back."""
        held, numel = self.at.held[h.name], math.prod(h.shape)
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
        (m, n), r, subspace = x.shape, x.rank, self.optim.subspace
        product, inner = self._product(x, r) * self.w, 0 if x.across else r * r * WIDE
        iterations = {"warm": 1, "randomized": RANDOMIZED_ITERATIONS}.get(subspace, 0)
        found = iterations * (product + n * r * self.w) + (product + inner if iterations else 0)
        if subspace == "svd" or (subspace == "gram" and (x.across or x.shared)):
            found = m * n * self.w
        elif subspace == "gram":
            found = n * n * WIDE
        largest = WIDE * (subspace not in ("svd", "random"))
        return found + largest + product + inner + WIDE  # what is measured: energy

    # Of the engine.

    def _passes(self) -> Amounts:
        """Return what FSDP2's forward and backward take."""
        at = self.at
        gathered, reduced = self._units(at.shapes), self._units(at.trained)
        head = self._units(name for name in at.trained if "embed_tokens" not in name)
        e, e_reduced, h = (units.pop(OUTSIDE, 0) for units in (gathered, reduced, head))
        b, b_reduced = max(gathered.values()), max(reduced.values())
        there = len(gathered)  # of the blocks, when the gradients of one are
        if self.engine.reshard_after_forward:
            there = min(there, 1 + max(self.engine.prefetch_blocks, 1))
        blocks = [name for name in at.trained if _unit(name) != OUTSIDE]
        later = [name for name in blocks if _unit(name) not in list(gathered)[:there]]
        done = at.own(later), at.own(blocks)
        if self.micros > 1:  # the gradients of the micro-batches before
            done = (at.own(at.trained) + b_reduced // self.N,) * 2
        elif self.optim.per_layer:
            done = 0 * done[0], 0 * done[1]
        block, root = self.d * b_reduced, self.d * e_reduced
        candidates = [
            (e + there * b + b_reduced + h) * self.c + block + done[0] * self.w,
            (e + (there - 1) * b + h) * self.c + (1 + self.gloo) * block + block // self.N + done[0] * self.w,
            e_reduced * self.c + root + done[1] * self.w,
            h * self.c + (1 + self.gloo) * root + root // self.N + done[1] * self.w,
        ]
        for is_block, gradients, update in self._units_at_update() if self.optim.per_layer else ():
            around = (e + (there - 1) * b + h) * self.c + block if is_block else h * self.c + root
            candidates.append(around + gradients + update)
        return np.max(candidates, axis=0)

    def _units(self, names: Iterable[str]) -> dict[str, int]:
        """Return the numbers of FSDP2's units: every process's shard is as large as the largest."""
        units: dict[str, int] = defaultdict(int)
        for name in names:
            units[_unit(name)] += int(self.at.held[name].max()) * self.N
        return units

    def _communicated(self) -> tuple[Any, Any]:
        """Return what is sent of parameters and of gradients."""
        at, n = self.at, self.at.n_procs
        ring, T = (self.N - 1) / self.N, sum(math.prod(at.shapes[name]) for name in at.trained)
        if self.engine.kind == "fsdp":
            gathered, reduced = self._units(at.shapes), sum(self._units(at.trained).values()) * self.d
            again = gathered.keys() - {OUTSIDE} if self.engine.reshard_after_forward else ()
            numbers = sum(gathered.values()) + sum(gathered[block] for block in again)
            replicas = 2 * (self.engine.replicas - 1) / self.engine.replicas
            times = 1 if self.engine.accumulate_unsharded else self.micros
            return self.micros * ring * numbers * self.c, times * (ring + replicas / self.N) * reduced
        if not at.stage:
            return 0, 2 * (n - 1) / n * T * self.w
        size = DTYPES[at.ds["communication_data_type"]].itemsize
        if at.stage == 3:
            everything = sum(math.prod(shape) for shape in at.shapes.values())
            far = everything > at.ds["zero_optimization"].get("stage3_max_reuse_distance", 1e9)
            numbers = everything * (2 if far else 1)
            return self.micros * ring * numbers * self.c, self.micros * ring * T * size
        return ring * T * self.c, (1 if at.stage == 1 else self.micros) * 2 * ring * T * size


_factored = functools.partial(moment_shapes, hp={"beta1": None})


def _of_part(kind: str, part: Amounts, of: Amounts) -> Amounts:
    """Return the bytes that a part of so many moments takes for the time of its update."""
    return part * np.where(part < of, *IN_PARTS[kind][::-1])


def _unit(name: str) -> str:
    """Return the block that a parameter belongs to, which FSDP2 gathers as a whole."""
    return OUTSIDE if (unit := unit_of(name)) == name else unit
