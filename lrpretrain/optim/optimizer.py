"""The wire between the rules and the tiles: torch optimizers that work on any sharding.

Matrices of one shape are worked on as a batch. Their state lies stacked, and `optimizer.state` shows
each parameter its own slice of it, so that state is created eagerly, with the same keys on every process.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lrpretrain.errors import ConfigError
from lrpretrain.optim.adamw import adamw, decay, is_sound
from lrpretrain.optim.moments import KEYS, KINDS, float_dtype
from lrpretrain.optim.rule import Rule, Slot
from lrpretrain.optim.subspace import METHODS
from lrpretrain.sharding import Holding, Piece, hold
from lrpretrain.sharding.algebra import CHUNK_BYTES, Matrices
from lrpretrain.sharding.placement import PLACEMENTS, Exchange, assign, choose
from lrpretrain.sharding.procs import Procs

T = TypeVar("T")
COUNTERS = frozenset(("step", "age", "updates"))


@dataclass
class Batch:
    """Equal-shaped matrices of one param group, with the stacked state that this process keeps of them.

    `owners` names the process of each matrix's update, for the placement of that name.
    """

    holdings: list[Holding]
    transposed: bool
    group: dict[str, Any]
    rank: int
    state: dict[str, Tensor]
    kept: list[int]
    """Which of the matrices the state is of."""
    owners: list[int] | None = None

    @property
    def hp(self) -> dict[str, Any]:
        """The options of the group as they are now; the rank is clamped to these matrices."""
        return self.group | {"rank": self.rank}

    def update(self, rule: Rule, ready: Callable[[Holding], bool], sound: Tensor | None) -> None:
        """Apply the rule to the matrices that are ready, then weight decay if that is not its own."""
        hp = self.hp | {"sound": sound}
        have = [i for i, h in enumerate(self.holdings) if ready(h)]
        for which in [have] if self.owners is None else self._chunks(have):
            chosen = set(which)
            rows = [row for row, i in enumerate(self.kept) if i in chosen]
            # A view where the rows are together, as they are unless gradients are missing.
            together = not rows or rows == list(range(rows[0], rows[-1] + 1))
            index = slice(rows[0], rows[-1] + 1) if rows and together else rows
            state = {key: tensor[index] for key, tensor in self.state.items()}
            holdings = [self.holdings[i] for i in which]
            if self.owners is not None:
                self._update_at_owners(rule, holdings, [self.owners[i] for i in which], state, hp)
            elif holdings:
                W, G = (kind(holdings, self.transposed) for kind in (Matrices.weights, Matrices.gradients))
                rule.update(W, G, state, hp)
            if not together:
                for key, tensor in state.items():
                    self.state[key][rows] = tensor
        if have and not rule.decays:
            decay([self.holdings[i].weight for i in have], hp)

    def _chunks(self, which: list[int]) -> list[list[int]]:
        """Cut the matrices so that the whole ones of a process take CHUNK_BYTES at a time."""
        h = self.holdings[0]
        count = max(1, CHUNK_BYTES * len(h.spread) // (math.prod(h.shape) * h.param.element_size()))
        return [which[i : i + count] for i in range(0, len(which), count)]

    def _update_at_owners(
        self,
        rule: Rule,
        holdings: list[Holding],
        owners: list[int],
        state: dict[str, Tensor],
        hp: dict[str, Any],
    ) -> None:
        exchange = Exchange(holdings, owners)
        weights = [h.weight for h in holdings]
        kinds = [[_grad(h) for h in holdings], *([weights] if rule.reads_weights else [])]
        grads, *olds = exchange.gather(*kinds)
        news = olds[0] if olds else [torch.zeros_like(grad) for grad in grads]
        if grads:
            own = [hold(holdings[i].name, new) for i, new in zip(exchange.mine, news, strict=True)]
            W = Matrices.weights(own, self.transposed)
            rule.update(W, Matrices(own, grads, self.transposed), state, hp)
        del grads
        for weight, new in zip(weights, exchange.scatter(news), strict=True):
            if rule.reads_weights:
                weight.copy_(new.view_as(weight))
            else:
                weight.add_(new.view_as(weight))


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW, and a matrix rule for the param groups that have a `rank`.

    Parameters may be plain tensors (one process, DDP), DTensors with at most one sharded dimension (FSDP2,
    HSDP) or shards of ZeRO's masters. Under sharding all processes must construct it and call `step`
    together; the collectives of a step do not grow with the number of matrices. `placements` counts the
    matrices by where their updates happen, and why (lrpretrain/sharding/placement.py).

    A step with a non-finite gradient changes nothing, is counted in `skipped_steps` and warned of
    (`check_finite`; it costs one wait for the device, and one scalar all-reduce under sharding).
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], rule: Rule | None = None, check_finite: bool = True
    ):
        self.rule = rule
        self.check_finite = check_finite
        self.skipped_steps = 0
        self.sound: Tensor | None = None  # whether the step that is being taken counts
        self._only: frozenset[int] | None = None  # ids of the parameters that the step is of, if not of all
        self._taken: list[tuple[Tensor, list[dict[str, Tensor]]]] = []  # by step_if: sound, whose states
        self._batches: list[Batch] = []
        self._pieces: dict[str, dict[str, Piece]] = {}
        self._regular: list[tuple[dict[str, Any], list[Holding]]] = []
        self.placements: Counter[tuple[str, str]] = Counter()
        self._loads: dict[Any, list[float]] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group and create its state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        if group["moments"] == "int8" and self.rule is None:
            reason = "moments='int8': blocks of eight bits run along the rank of projected gradients, and"
            raise ConfigError([f"{reason} {type(self).__name__} has none. Use bfloat16 or float32."])
        start = sum(len(g["params"]) for g in self.param_groups[:-1])
        names = group.get("param_names") or [f"param_{start + i}" for i in range(len(group["params"]))]
        holdings = [hold(name, param) for name, param in zip(names, group["params"], strict=True)]
        if self.rule is not None and self.rule.whole_only:
            require_whole(holdings, type(self.rule).__name__)
        if group.get("rank") is None or self.rule is None:
            self._add_regular(group, holdings)
        else:
            self._add_matrices(group, holdings, self.rule)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not all(p in self.state for group in self.param_groups for p in group["params"]):
            reason = "the parameters are not those that the optimizer was built on, but other buffers"
            remedy = "Under DeepSpeed let lrpretrain build the engine (engine.kind=zero)"
            raise ConfigError([f"{reason}. {remedy}."])
        if self.check_finite and not self._gradients_are_finite():
            self.skipped_steps += 1
            warnings.warn(
                f"a gradient is not finite: step skipped ({self.skipped_steps} so far)", stacklevel=2
            )
            return loss
        for group, holdings in self._regular:
            options = group | {"sound": self.sound}
            self._update_regular(options, [h for h in holdings if self._is_ready(h.param)])
        if self.rule is not None:
            for batch in self._batches:
                batch.update(self.rule, lambda h: self._is_ready(h.param), self.sound)
        return loss

    def step_if(self, sound: Tensor, only: Iterable[Tensor] | None = None) -> None:
        """Do a step that leaves no trace where `sound`, a bool () on the device, is false.

        The host does not wait for it, but in steps that renew bases or are exact, and where a rule takes
        whole matrices only. It need be the same on all processes. `only` these parameters are updated, if
        given: a model may be so in several steps (not LORO's pairs). `settle` ends them, before a parameter
        is updated again.
        """
        if self.rule is not None and self.rule.whole_only and not is_sound({"sound": sound}):
            return
        self.sound, self._only = sound, None if only is None else frozenset(map(id, only))
        params = (p for group in self.param_groups for p in group["params"] if self._is_ready(p))
        self._taken.append((sound, [self.state[p] for p in params]))
        try:
            self.step()
        finally:
            self.sound = self._only = None

    def settle(self, sound: bool) -> None:
        """Take back the counters of the steps by `step_if` that were not sound, unless all were `sound`."""
        taken, self._taken = self._taken, []
        for counts, states in () if sound else taken:
            for state in () if counts else states:
                for key in COUNTERS & state.keys():
                    state[key] -= 1

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        """Yield the state as (parameter's name, key, piece), for a checkpoint that any sharding can load."""
        for name, pieces in self._pieces.items():
            for key, piece in pieces.items():
                yield name, key, piece

    def pop_metrics(self, procs: Procs | None = None) -> dict[str, float]:
        """Return what was measured at refreshes since the last call: means of energy, overlap, time.

        Of the matrices that this process has a part in, or of all with `procs`, which all must pass then.
        """
        if self.rule is None:
            return {}
        notes, self.rule.refreshes = self.rule.refreshes, []
        values: list[tuple[str, tuple[float, float | None]]] = []
        for n in notes:
            overlaps = [None] * len(n.names) if n.overlap is None else n.overlap.tolist()
            values += zip(n.names, zip(n.energy.tolist(), overlaps, strict=True), strict=True)
        measured = merge_notes(values, procs)
        ms = max((procs or Procs()).gather(sum(n.ms for n in notes)))
        if not measured:
            return {}
        renewed = [overlap for _, overlap in measured if overlap is not None]
        return {
            "subspace/refreshes": len(measured),
            "subspace/matrices": sum(len(batch.holdings) for batch in self._batches),
            "subspace/energy": sum(energy for energy, _ in measured) / len(measured),
            "perf/refresh_ms": ms,
        } | ({"subspace/overlap": sum(renewed) / len(renewed)} if renewed else {})

    def describe(self) -> str:
        """Return where the matrices are updated, and why, in a line."""
        parts = [f"{count} {place} ({reason})" for (place, reason), count in self.placements.items()]
        return f"matrices by where they are updated: {', '.join(parts) or 'none'}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, on the same sharding; parameters are matched by their position.

        Tensors are copied into the state as it is, without torch's cast to the parameter's dtype.
        Raises ConfigError if the parameters or their state do not match, and changes nothing then.
        """
        ours, theirs = self.param_groups, state_dict["param_groups"]
        if [len(g["params"]) for g in ours] != [len(g["params"]) for g in theirs]:
            reason = "the state to load is of other parameters. Build the optimizer as it was built then."
            raise ConfigError([reason])
        params = (param for group in ours for param in group["params"])
        keys = (key for group in theirs for key in group["params"])
        pairs = [
            (self.state[p], state_dict["state"].get(k, {}), k) for p, k in zip(params, keys, strict=True)
        ]
        for own, saved, index in pairs:
            for key in own.keys() | saved.keys():
                fits = key in own and key in saved and own[key].shape == saved[key].shape
                if not fits or (key == "side" and not torch.equal(saved[key].cpu(), own[key])):
                    what = f"the saved state of parameter {index} has no matching {key!r}"
                    raise ConfigError([f"{what}. Use the same rule, rank, side and moments."])
        for own, saved, _ in pairs:
            for key, tensor in own.items():
                tensor.copy_(saved[key])
        for group, saved in zip(ours, theirs, strict=True):
            group.update({k: v for k, v in saved.items() if k not in ("params", "param_names")})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()  # torch keeps the parameters and their state only

    def _is_ready(self, param: Tensor) -> bool:
        return param.grad is not None and (self._only is None or id(param) in self._only)

    def _update_regular(self, group: dict[str, Any], ready: list[Holding]) -> None:
        if ready:
            state = [self.state[h.param] for h in ready]
            adamw([h.weight for h in ready], [_grad(h) for h in ready], state, group)

    def _add_regular(self, group: dict[str, Any], holdings: list[Holding]) -> None:
        for h in holdings:
            pieces = {"step": Piece.whole(torch.zeros((), dtype=torch.int64))}
            dtype = float_dtype(group["moments"], h.weight.dtype)
            for key in KEYS:
                pieces[key] = h.of(torch.zeros_like(h.weight, dtype=dtype))
            self._register(h, pieces)
        self._regular.append((group, holdings))

    def _add_matrices(self, group: dict[str, Any], holdings: list[Holding], rule: Rule) -> None:
        # Spread over the group, not over a batch: what counts is the work of a step.
        gap, spread = group.get("update_proj_gap", 1), group.get("refresh") == "staggered"
        phases = {h.name: i * gap // len(holdings) if spread else 0 for i, h in enumerate(holdings)}
        batches: dict[tuple[Any, ...], Batch] = {}
        for h in holdings:
            if len(h.shape) != 2:
                reason = f"{h.name} has the shape {h.shape}: a group with a rank takes matrices only."
                raise ConfigError([reason])
            rank = min(group["rank"], *h.shape)
            hp = group | {"rank": rank}
            transposed = rule.transposed(h.shape, hp)
            place = self._place(h, hp, transposed, rule)
            cut = h.spread if place == "aligned" else place
            key = h.shape, h.split, cut, h.group, h.param.dtype, h.param.device
            batches.setdefault(key, Batch([], transposed, group, rank, {}, [])).holdings.append(h)
            if place == "owner":
                batches[key].owners = []
        for shape in {b.holdings[0].shape for b in batches.values() if b.rank < group["rank"]}:
            warnings.warn(
                f"rank {group['rank']} is larger than {shape}: clamped to {min(shape)}", stacklevel=5
            )
        models = {id(b): _model_state(rule, b) for b in batches.values()}
        self._assign([b for b in batches.values() if b.owners is not None], models)
        for batch in batches.values():
            self._add_batch(batch, rule, models[id(batch)], phases)

    def _place(self, h: Holding, hp: dict[str, Any], transposed: bool, rule: Rule) -> str:
        wanted = hp["placement"]
        if wanted == "seeded" and (hp["subspace"] != "random" or rule.needs_whole(hp)):
            raise ConfigError(["placement='seeded': needs random bases. Use subspace='random', or auto."])
        if wanted == "aligned" and hp["proj_type"] == "full" and h.group is not None:
            # What is zero but for rounding after a refresh (the entries off the diagonal), Adam makes large.
            raise ConfigError(["placement='aligned': proj_type='full' needs whole matrices. Use owner."])
        found = choose(h, int(transposed), hp["rank"], rule.needs_whole(hp))
        if wanted != "auto" and h.group is not None:
            found = "owner" if wanted == "owner" else "aligned", f"placement={wanted}"
        self.placements[found] += 1
        return found[0]

    def _assign(self, batches: list[Batch], models: Mapping[int, Mapping[str, Slot]]) -> None:
        """Choose the owners of all matrices that need one, so that each process keeps as much state."""
        todo = [(batch, h) for batch in batches for h in batch.holdings]
        for process_group in dict.fromkeys(h.group for _, h in todo):
            part = [(batch, h) for batch, h in todo if h.group is process_group]
            costs = [sum(math.prod(slot.shape) for slot in models[id(batch)].values()) for batch, _ in part]
            loads = self._loads.setdefault(process_group, [0.0] * len(part[0][1].spread))
            for (batch, _), owner in zip(part, assign([h for _, h in part], costs, loads), strict=True):
                assert batch.owners is not None
                batch.owners.append(owner)

    def _add_batch(
        self, batch: Batch, rule: Rule, model: Mapping[str, Slot], phases: Mapping[str, int]
    ) -> None:
        """Create the state of a batch: of all matrices, or of those that this process owns."""
        own, batch.kept = batch.holdings, list(range(len(batch.holdings)))
        if batch.owners is not None:
            exchange = Exchange(batch.holdings, batch.owners)
            weights = [h.weight for h in batch.holdings]
            wholes = (
                exchange.gather(weights)[0]
                if rule.reads_weights
                else [weights[0].new_empty(batch.holdings[0].shape) for _ in exchange.mine]
            )
            batch.kept = exchange.mine
            own = [hold(batch.holdings[i].name, w) for i, w in zip(batch.kept, wholes, strict=True)]
        slots: dict[str, Slot] = {}
        if own:
            slots = rule.state(Matrices.weights(own, batch.transposed), batch.hp)
            slots["step"] = Slot.whole(torch.zeros(len(own), dtype=torch.int64))
            slots["phase"] = Slot.whole(torch.tensor([phases[h.name] for h in own]))
        batch.state = {key: slot.tensor for key, slot in slots.items()}
        for row, i in enumerate(batch.kept):
            pieces = {key: Piece(t[row], shape, tiles) for key, (t, shape, tiles) in slots.items()}
            self._register(batch.holdings[i], pieces)
        counters = {key: Slot(torch.empty(0, dtype=torch.int64), (), ()) for key in ("step", "phase")}
        for i in set(range(len(batch.holdings))) - set(batch.kept):
            h = batch.holdings[i]
            pieces = {}
            for key, slot in {**model, **counters}.items():
                device = h.param.device if slot.tensor.is_meta else slot.tensor.device
                nothing = torch.empty(0, dtype=slot.tensor.dtype, device=device)
                pieces[key] = Piece(nothing, slot.shape, ())
            self._register(h, pieces)
        self._batches.append(batch)

    def _register(self, holding: Holding, pieces: dict[str, Piece]) -> None:
        if holding.name in self._pieces:
            raise ConfigError([f"two parameters are named {holding.name}. Give each a name of its own."])
        self._pieces[holding.name] = pieces
        self.state[holding.param] = {key: piece.tensor for key, piece in pieces.items()}

    def _gradients_are_finite(self) -> bool:
        holdings = [h for _, hs in self._regular for h in hs] + [h for b in self._batches for h in b.holdings]
        if not holdings:
            return True
        grads = [grad for h in holdings if (grad := h.grad) is not None and grad.numel()]
        largest = torch._foreach_norm(grads, ord=math.inf) if grads else [torch.zeros(())]
        broken = (~torch.isfinite(torch.stack(largest))).any().float().to(holdings[0].param.device)
        for group in dict.fromkeys(h.group for h in holdings if h.group is not None):
            dist.all_reduce(broken, group=group)
        return not bool(broken)


class AdamW(ShardedOptimizer):
    """AdamW in the Hugging Face form (eps on the uncorrected root), on any supported sharding.

    `moments` is the dtype that moments are stored in: float32 or bfloat16 (None: the parameter's).
    Raises ConfigError for a negative learning rate, eps or weight decay, or betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        moments: str | None = None,
        check_finite: bool = True,
    ):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults | {"moments": moments}, None, check_finite)


def _model_state(rule: Rule, batch: Batch) -> dict[str, Slot]:
    """Return the state of one whole matrix of a batch, without its memory."""
    h = batch.holdings[0]
    whole = hold(h.name, torch.empty(h.shape, dtype=h.param.dtype, device="meta"))
    return rule.state(Matrices.weights([whole], batch.transposed), batch.hp)


def merge_notes(notes: list[tuple[str, T]], procs: Procs | None) -> list[T]:
    """Return the values noted under names, over all processes; what several noted alike is there once."""
    merged: dict[tuple[str, int], T] = {}
    for part in (procs or Procs()).gather(notes):
        seen: Counter[str] = Counter()
        for name, value in part:
            merged.setdefault((name, seen[name]), value)
            seen[name] += 1
    return list(merged.values())


def _grad(holding: Holding) -> Tensor:
    grad = holding.grad
    assert grad is not None
    return grad


def require_whole(holdings: list[Holding], rule: str) -> None:
    """Raise ConfigError if a parameter is cut among processes, or lies in a flat buffer."""
    if cut := [h.name for h in holdings if h.group is not None or h.weight.shape != h.shape]:
        reason = f"{cut[0]} is cut among processes, and {rule} takes whole parameters (one process, or DDP)"
        raise ConfigError([f"{reason}. Use another rule or mode, or DDP."])


def _check(group: dict[str, Any]) -> None:
    """Raise ConfigError naming everything in a param group that cannot work."""
    known: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda x: x >= 0, "at least 0"),
        "eps": (lambda x: x >= 0, "at least 0"),
        "weight_decay": (lambda x: x >= 0, "at least 0"),
        "betas": (lambda x: all(0 <= beta < 1 for beta in x), "in [0, 1)"),
        "rank": (lambda x: x is None or (isinstance(x, int) and x >= 1), "a whole number from 1"),
        "update_proj_gap": (lambda x: isinstance(x, int) and x >= 1, "a whole number from 1"),
    }
    choices = {
        "proj_type": ("std", "reverse_std", "left", "right", "full"),
        "subspace": METHODS,
        "refresh": ("fixed", "staggered"),
        "moments_at_refresh": ("keep", "reset", "rotate"),
        "placement": PLACEMENTS,
        "moments": KINDS,
        "basis": (None, "float32", "bfloat16"),
    }
    wrong = [
        f"{k}={group[k]!r}: must be {must}."
        for k, (fits, must) in known.items()
        if k in group and not fits(group[k])
    ]
    wrong += [
        f"{k}={group[k]!r}: must be one of {', '.join(map(str, known))}."
        for k, known in choices.items()
        if k in group and group[k] not in known
    ]
    if group.get("proj_type") == "full" and group.get("moments_at_refresh") == "rotate":
        wrong.append("moments_at_refresh='rotate': is not defined for proj_type='full'. Use keep or reset.")
    if wrong:
        raise ConfigError(wrong)
