"""Every rule on every layout: a few training steps on a small LLaMA with odd shapes, for comparison."""

import json

import torch
import torch.distributed as dist

from lrpretrain.config import from_dict
from lrpretrain.engine import build_engine
from lrpretrain.sharding.procs import Procs

MODEL = {
    "model_type": "llama",
    "vocab_size": 509,
    "hidden_size": 60,
    "intermediate_size": 173,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
STEPS, ROWS, LENGTH = 8, 36, 12  # 36 rows a step: 1 and 3 micro-batches on 1 to 4 processes
RULES = {
    "adamw": {"rule": "adamw"},
    "galore-std": {"rule": "galore", "side": "std"},
    "galore-left": {"rule": "galore", "side": "left"},
    "galore-right": {"rule": "galore", "side": "right"},
    "gradnormlorp": {"rule": "gradnormlorp"},
    # Right after its moments are zeroed, Adam makes steps of rounding: the others, not the factors, feel it.
    "loro": {"rule": "loro", "lr_regular": 0.002},
}
STORED = {  # moments and bases in fewer bits than the weights
    "galore-int8": {"rule": "galore", "moments": "int8"},
    "gradnormlorp-int8": {"rule": "gradnormlorp", "moments": "int8", "moments_at_refresh": "rotate"},
    "galore-bfloat16": {"rule": "galore", "moments": "bfloat16", "basis": "bfloat16"},
    "gradnormlorp-bfloat16": {"rule": "gradnormlorp", "moments": "bfloat16", "basis": "bfloat16"},
    "loro-bfloat16": RULES["loro"] | {"moments": "bfloat16"},
    "adamw-bfloat16": RULES["adamw"] | {"moments": "bfloat16"},
}
ZERO3 = {"stage": 3, "sub_group_size": 15000}  # several sub-groups
LAYOUTS = {
    "ddp": ({"kind": "ddp"}, None),
    "fsdp": ({"kind": "fsdp"}, None),
    "hsdp": ({"kind": "fsdp", "replicas": 2}, None),
    "zero1": ({"kind": "zero"}, {"stage": 1}),
    "zero2": ({"kind": "zero"}, {"stage": 2}),
    "zero2-round-robin": ({"kind": "zero"}, {"stage": 2, "round_robin_gradients": True}),
    "zero2-scattered": ({"kind": "zero"}, {"stage": 2, "contiguous_gradients": False}),
    "zero3": ({"kind": "zero"}, ZERO3 | {"stage3_param_persistence_threshold": 0}),
    "zero3-persistent": ({"kind": "zero"}, ZERO3),
}


def configure(folder, rule, layout, micros, n_procs, optim=(), **sections):
    """Return the configuration of a case; `micros` micro-batches a step."""
    model = folder / f"model_{dist.get_rank() if dist.is_initialized() else 0}.json"
    model.write_text(json.dumps(MODEL))
    engine, zero = LAYOUTS[layout] if layout != "local" else ({"kind": "local"}, None)
    if zero is not None:
        path = folder / f"ds_{dist.get_rank()}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        engine = engine | {"ds_config": str(path)}
    steps = {"rank": 5, "refresh_every": 4, "exact_every": 5, "lr": 0.01}
    train = {"micro_batch": ROWS // n_procs // micros, "global_batch": ROWS, "clip_norm": 0.5}
    tree = {
        "model": {"config": str(model)},
        "optim": steps | (RULES | STORED)[rule] | dict(optim),
        "engine": engine,
        "train": train | {"steps": STEPS, "warmup_steps": 0},
    }
    return from_dict(tree | sections)


def batches():
    """Return the ids (rows, length) of each step."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, MODEL["vocab_size"], (ROWS, LENGTH), generator=generator) for _ in range(STEPS)]


def train(config, procs):
    """Train some steps; return the losses and the whole weights."""
    engine = build_engine(config, procs, torch.device("cpu"), pad_id=0)
    targets = ROWS * (LENGTH - 1)
    losses, norms = [], []
    for rows in batches():
        own = rows.split(ROWS // procs.n_procs)[procs.proc]
        micros = list(own.split(config.train.micro_batch))
        step = engine.train_step(micros, targets, config.train.clip_norm, 1.0)
        losses.append(float(engine.total(step.loss_sum.double())) / targets)
        norms.append(step.grad_norm)
    weights = whole_weights(engine, procs)
    engine.close()
    return losses, norms, weights


def whole_weights(engine, procs):
    """Return the whole float32 weights by name; for low-rank layers their products."""
    whole = {h.name: torch.zeros(h.shape) for h in engine.holdings}
    own = {h.name: [(tile, part.clone()) for tile, part in h.piece.parts] for h in engine.holdings}
    for pieces in procs.gather(own):
        for name, parts in pieces.items():
            for tile, part in parts:
                whole[name][tuple(tile.span(d) for d in range(part.dim()))] = part
    for name in [n for n in whole if n.endswith("weight_in")]:
        layer = name.removesuffix("_in")
        whole[layer] = whole.pop(f"{layer}_out") @ whole.pop(name).T
    return whole


def compare(folder, cases):
    """Run cases (rule, layout, micro-batches); return by case the worst differences from one process."""
    procs = Procs.of_default_group()
    results = {}
    for rule, layout, micros in cases:
        alone = train(configure(folder, rule, "local", micros, 1), Procs())
        ours = train(configure(folder, rule, layout, micros, procs.n_procs), procs)
        results[rule, layout, micros] = difference(ours, alone)
    return results


def difference(ours, theirs):
    """Return the worst relative difference of losses and gradient norms, and of the weights (Frobenius)."""
    losses = [abs(a - b) / abs(b) for kind in (0, 1) for a, b in zip(ours[kind], theirs[kind], strict=True)]
    assert ours[2].keys() == theirs[2].keys()
    weights = [float((ours[2][n] - w).norm() / w.norm()) for n, w in theirs[2].items()]
    return tuple(float(torch.tensor(each or [0.0]).max()) for each in (losses, weights))  # NaN counts


BFLOAT16 = {"precision": {"compute": "bfloat16"}}  # zero1: with BF16_Optimizer, for its float32 accumulation


def bfloat16_losses(folder, rules, layout):
    """Return the losses of each rule in bfloat16 arithmetic over float32 masters."""
    procs = Procs.of_default_group()
    return {
        rule: train(configure(folder, rule, layout, 3, procs.n_procs, **BFLOAT16), procs)[0] for rule in rules
    }


def bfloat16_steps(folder, rules):
    """Feed BF16_Optimizer's client and one process the same float32 gradients; compare the masters."""
    procs = Procs.of_default_group()
    differences = {}
    for rule in rules:
        alone = build_engine(configure(folder, rule, "local", 1, 1), Procs(), torch.device("cpu"), pad_id=0)
        config = configure(folder, rule, "zero1", 1, procs.n_procs, **BFLOAT16)
        ours = build_engine(config, procs, torch.device("cpu"), pad_id=0)
        assert type(ours.deepspeed.optimizer).__name__ == "BF16_Optimizer"
        ours.client.optimizer = ours.optimizer
        for engine in (alone, ours):
            for group in engine.optimizer.param_groups:
                group["lr"] = group["peak_lr"]
        flats = [p for group in ours.client.param_groups for p in group["params"]]
        for t in range(STEPS):
            generator = torch.Generator().manual_seed(t)
            grads = {h.name: torch.randn(h.shape, generator=generator) for h in alone.holdings}
            for flat in flats:
                flat.grad = torch.zeros_like(flat)
            masters = {id(flat): flat for flat in flats}
            for a, h in zip(alone.holdings, ours.holdings, strict=True):
                a.param.grad = grads[h.name]
                grad = masters[id(h.param.flat)].grad[h.param.span]
                for tile, part in h.of(grad).parts:
                    part.copy_(grads[h.name][tuple(tile.span(d) for d in range(part.dim()))])
            alone.optimizer.step()
            ours.client.step()
        results = [([], [], whole_weights(*run)) for run in ((ours, procs), (alone, Procs()))]
        differences[rule] = difference(*results)[1]
        ours.close()
    return differences
