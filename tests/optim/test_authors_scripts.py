"""Scripts as users of galore_torch and loro_torch write them, with nothing but the imports changed."""

import io
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lrpretrain.model.lowrank import apply_lowrank_param, get_lowrank_param
from lrpretrain.optim import GaLoreAdamW, LOROAdamW

STEPS = 20


@pytest.fixture
def llama():
    """A function that returns the same small model and tokens at each call."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4
    )

    def make():
        torch.manual_seed(0)
        return LlamaForCausalLM(config), torch.randint(2, 64, (4, 12))

    return make


def galore_params_of(model):
    """Split as GaLore's training script does: linear layers of attention and MLP, and all the rest."""
    galore_params = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(key in name for key in ("attn", "mlp"))
    ]
    ids = {id(p) for p in galore_params}
    return galore_params, [p for p in model.parameters() if id(p) not in ids]


def losses_of(model, ids, optimizer, scheduler, steps):
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def cosine(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / 40)))


def test_galore_as_its_readme_has_it(llama):
    model, ids = llama()
    galore_params, non_galore_params = galore_params_of(model)
    param_groups = [
        {"params": non_galore_params},
        {"params": galore_params, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    with pytest.warns(UserWarning, match="rank 128 .* clamped"):  # theirs clamps without a word
        optimizer = GaLoreAdamW(param_groups, lr=0.01)
    losses = losses_of(model, ids, optimizer, cosine(optimizer), STEPS)
    assert losses[-1] < losses[0] - 1


def test_galore_saved_and_resumed(llama):
    def start():
        model, ids = llama()
        galore_params, regular_params = galore_params_of(model)
        options = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std", "proj_quant": False}
        param_groups = [{"params": regular_params}, {"params": galore_params, **options}]
        optimizer = GaLoreAdamW(param_groups, lr=0.01, weight_decay=0)
        return model, ids, optimizer, cosine(optimizer)

    whole = losses_of(*start(), STEPS)
    assert whole[-1] < whole[0] - 0.5

    model, ids, optimizer, scheduler = start()
    losses = losses_of(model, ids, optimizer, scheduler, 8)
    checkpoint, parts = io.BytesIO(), (model, optimizer, scheduler)
    torch.save([part.state_dict() for part in parts], checkpoint)
    checkpoint.seek(0)
    model, ids, optimizer, scheduler = start()
    for part, state in zip((model, optimizer, scheduler), torch.load(checkpoint), strict=True):
        part.load_state_dict(state)
    assert losses + losses_of(model, ids, optimizer, scheduler, STEPS - 8) == whole


def test_galore_with_an_optimizer_for_each_layer_in_the_backward_pass(llama):
    options = {"rank": 4, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
    model, ids = llama()
    galore_params, regular_params = galore_params_of(model)
    together = GaLoreAdamW([{"params": regular_params}, {"params": galore_params, **options}], lr=0.01)
    twin, _ = llama()
    galore_params, _ = galore_params_of(twin)
    optimizer_dict = {
        p: GaLoreAdamW([{"params": [p], **(options if any(p is q for q in galore_params) else {})}], lr=0.01)
        for p in twin.parameters()
    }

    def optimizer_hook(p):
        optimizer_dict[p].step()
        optimizer_dict[p].zero_grad()

    for p in twin.parameters():
        p.register_post_accumulate_grad_hook(optimizer_hook)
    for _ in range(8):
        model(input_ids=ids, labels=ids).loss.backward()
        together.step()
        together.zero_grad()
        twin(input_ids=ids, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def low_rank(model):
    apply_lowrank_param(
        model, model.config, model_type="llama", scope="all", attn_rank=4, mlp_rank=6, init="xavier"
    )
    return get_lowrank_param(model, model.config)


def test_loro_as_its_readme_has_it(llama):
    model, ids = llama()
    param_groups = low_rank(model)
    optimizer = LOROAdamW(param_groups, lr=0.01, weight_decay=0.0, loro_type="loro", model=model)
    losses = losses_of(model, ids, optimizer, cosine(optimizer), STEPS)
    assert losses[-1] < losses[0] - 0.5
    assert not any(v is model for v in vars(optimizer).values())


def test_loro_with_a_driver_that_counts_and_refreshes(llama):
    model, ids = llama()
    optimizer = LOROAdamW(low_rank(model), lr=0.01, weight_decay=0.0, loro_type="loro", model=model)
    losses = []
    for update_step in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        use_exact_loro = (update_step + 1) % 5 == 0
        optimizer.step(use_exact_loro=use_exact_loro)
        if use_exact_loro:
            optimizer.refresh_states("all")
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert optimizer.deficient_pairs == 0
    assert optimizer.pop_metrics()["loro/exact_pairs"] == 14 * STEPS // 5
