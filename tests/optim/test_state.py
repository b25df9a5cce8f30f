"""The state of every optimizer: tensors from the start, which a checkpoint carries and a run goes on from."""

import copy
import io
import zlib

import pytest
import torch

from lrpretrain.errors import ConfigError
from lrpretrain.optim import AdamW, GaLoreAdamW, GradNormLoRPAdamW, LOROAdamW

CLASSES = {"adamw": AdamW, "galore": GaLoreAdamW, "gradnormlorp": GradNormLoRPAdamW, "loro": LOROAdamW}
SHAPES = [(8, 5), (5, 8), (8, 5)]
MIXES = {
    "adamw": {"weight_decay": 0.1},
    "adamw bfloat16": {"moments": "bfloat16"},
    "galore": {},
    "galore full reset": {"proj_type": "full", "moments_at_refresh": "reset"},
    "galore left warm rotate": {"proj_type": "left", "subspace": "warm", "moments_at_refresh": "rotate"},
    "galore random staggered": {"subspace": "random", "refresh": "staggered"},
    "galore int8 warm rotate": {"moments": "int8", "subspace": "warm", "moments_at_refresh": "rotate"},
    "galore bfloat16 full": {"moments": "bfloat16", "basis": "bfloat16", "proj_type": "full"},
    "galore float32 left": {"moments": "float32", "basis": "float32", "proj_type": "left"},
    "gradnormlorp": {},
    "gradnormlorp int8 reset": {"moments": "int8", "basis": "bfloat16", "moments_at_refresh": "reset"},
    "gradnormlorp reverse_std gram reset": {
        "proj_type": "reverse_std",
        "subspace": "gram",
        "moments_at_refresh": "reset",
    },
    "gradnormlorp randomized staggered": {"subspace": "randomized", "refresh": "staggered"},
    "loro": {"exact_every": 3},
    "loro refresh": {"exact_every": 3, "refresh": "all"},
    "loro eucl": {"loro_type": "eucl"},
    "loro bfloat16": {"exact_every": 3, "moments": "bfloat16"},
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]

every_mix = pytest.mark.parametrize("mix", MIXES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64", "bfloat16"])


def draw(key, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def build(mix, dtype=torch.float32, **changes):
    """Return the parameters by kind and their optimizer; a mix begins with its rule."""
    rule, options = mix.split()[0], MIXES[mix] | changes
    pairs = {"lowrank_in": [(n, 3) for _, n in SHAPES], "lowrank_out": [(m, 3) for m, _ in SHAPES]}
    shapes = {"regular": [(4,), (3, 2)]} | (pairs if rule == "loro" else {"matrix": SHAPES})
    params = {
        kind: [torch.nn.Parameter(draw(f"{kind} {i}", s).to(dtype)) for i, s in enumerate(members)]
        for kind, members in shapes.items()
    }
    groups = [{"params": members} for members in params.values()]
    if rule in ("adamw", "loro"):
        groups = [g | {"type": kind} for g, kind in zip(groups, params, strict=True)]
    else:
        groups[1] |= {"rank": 3, "update_proj_gap": 3} | options
        options = {}
    return params, CLASSES[rule](groups, **{"lr": 0.01} | options)


def train(params, optimizer, steps):
    for t in steps:
        for kind, members in params.items():
            for i, p in enumerate(members):
                p.grad = draw(f"{kind} {i} {t}", p.shape).to(p.dtype)
        optimizer.step()


def saved_and_loaded(optimizer):
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@every_dtype
@every_mix
def test_state_is_tensors_that_are_there_from_the_start_and_stay_where_they_are(mix, dtype):
    params, optimizer = build(mix, dtype)
    places = {}
    for members in params.values():
        states = [optimizer.state[p] for p in members]
        assert all(state.keys() == states[0].keys() for state in states)
        assert {"step", "exp_avg", "exp_avg_sq"} <= states[0].keys()
        assert all(type(t) is torch.Tensor and not t.requires_grad for s in states for t in s.values())
        places |= {(p, key): t.data_ptr() for p in members for key, t in optimizer.state[p].items()}
    dtypes = {(p, key): optimizer.state[p][key].dtype for p, key in places}
    train(params, optimizer, range(7))
    for members in params.values():
        for p in members:
            for key, t in optimizer.state[p].items():
                assert (t.data_ptr(), t.dtype) == (places.pop((p, key)), dtypes[p, key])
    assert not places


@every_dtype
@every_mix
def test_a_saved_state_goes_on_to_the_bit(mix, dtype):
    params, optimizer = build(mix, dtype)
    train(params, optimizer, range(5))
    others, again = build(mix, dtype, lr=0.5)
    train(others, again, range(50, 52))
    with torch.no_grad():
        for kind, members in others.items():
            for ours, theirs in zip(members, params[kind], strict=True):
                ours.copy_(theirs)
    again.load_state_dict(saved_and_loaded(optimizer))
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for steps in (range(0), range(5, 12)):
        train(params, optimizer, steps)
        train(others, again, steps)
        for kind, members in others.items():
            for ours, theirs in zip(members, params[kind], strict=True):
                assert torch.equal(ours, theirs)
                for key, t in again.state[ours].items():
                    assert t.dtype == optimizer.state[theirs][key].dtype
                    assert torch.equal(t, optimizer.state[theirs][key]), key


def test_magnitudes_stay_in_float32_beside_bfloat16_weights():
    params, optimizer = build("gradnormlorp", torch.bfloat16)
    train(params, optimizer, range(2))
    others, again = build("gradnormlorp", torch.bfloat16)
    again.load_state_dict(saved_and_loaded(optimizer))
    for p in others["matrix"]:
        for key, t in again.state[p].items():
            counter = key in ("step", "age", "phase", "side")
            precise = key == "norm" or key.startswith("magnitude")
            assert t.dtype == (torch.int64 if counter else torch.float32 if precise else torch.bfloat16), key


@pytest.mark.parametrize(
    ("own", "theirs", "changes"),
    [
        ("galore", "galore", {"rank": 2}),
        ("galore", "galore", {"proj_type": "reverse_std"}),
        ("galore", "galore full reset", {}),
        ("galore full reset", "galore", {}),
        ("gradnormlorp", "galore", {}),
        ("galore", "gradnormlorp", {}),
        ("loro", "adamw", {}),
        ("adamw", "galore", {}),
    ],
)
def test_a_state_of_another_rule_rank_or_side_is_refused(own, theirs, changes):
    with pytest.raises(ConfigError, match=r"other parameters|Use the same rule, rank, side and moments"):
        build(own)[1].load_state_dict(saved_and_loaded(build(theirs, **changes)[1]))


def test_a_state_of_other_parameters_is_refused():
    optimizer = GaLoreAdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ConfigError, match="other parameters"):
        build("galore")[1].load_state_dict(optimizer.state_dict())


@every_mix
def test_a_copy_goes_on_by_itself(mix):
    params, optimizer = build(mix)
    train(params, optimizer, range(2))
    others, again = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(2, 6))
    assert not torch.equal(others["regular"][0], params["regular"][0])
    train(others, again, range(2, 6))
    for kind, members in others.items():
        assert all(torch.equal(a, b) for a, b in zip(members, params[kind], strict=True))


def test_two_parameters_of_one_name_are_refused():
    named = [("w", torch.nn.Parameter(torch.zeros(3)))], [("w", torch.nn.Parameter(torch.zeros(3)))]
    with pytest.raises(ConfigError, match="two parameters are named w"):
        AdamW([{"params": group} for group in named])


def test_torch_distributed_checkpoint_carries_the_state():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model_and_optimizer(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
        groups = [
            {"params": [model[0].bias, model[1].bias]},
            {"params": [model[0].weight, model[1].weight], "rank": 2, "update_proj_gap": 3},
        ]
        return model, GaLoreAdamW(groups, lr=0.01)

    def step(model, optimizer, seed):
        model(draw(str(seed), (3, 6))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = model_and_optimizer(0)
    other, again = model_and_optimizer(1)
    for t in range(5):
        step(model, optimizer, t)
    set_optimizer_state_dict(other, again, get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    for t in range(5, 9):
        step(model, optimizer, t)
        step(other, again, t)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_refused_state_changes_nothing():
    params, optimizer = build("galore")
    train(params, optimizer, range(3))
    before = [t.clone() for state in optimizer.state.values() for t in state.values()]
    theirs = build("galore")[1].state_dict()
    theirs["state"][4].pop("basis")
    with pytest.raises(ConfigError, match="basis"):
        optimizer.load_state_dict(theirs)
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
