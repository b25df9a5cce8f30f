"""Trajectories of the authors' code, and how to follow them."""

import json
import warnings
from pathlib import Path

import numpy as np
import torch

from lrpretrain.optim import subspace

GOLDEN = Path(__file__).parent / "golden"
BASES = ("ortho", "ortho_right")


def follow_signs(monkeypatch, z, names):
    """Give singular vectors the recorded signs: those are the whim of the CPU that LAPACK ran on.

    The subspace and the order of the vectors stay ours, and must be the recorded ones.
    """
    plain = subspace._svd

    def svd(matrix):
        u, vh = plain(matrix)
        for n in names:
            grads = torch.tensor(z[f"{n}/grad"])
            if grads.shape[1:] != matrix.shape:
                continue
            t = next(t for t in range(len(grads)) if torch.equal(grads[t], matrix))
            for basis in (torch.tensor(z[f"{n}/state/{k}"][t]) for k in BASES if f"{n}/state/{k}" in z.files):
                own = u.T if basis.shape[0] == u.shape[0] and basis.shape[1] != vh.shape[1] else vh
                theirs = basis.T if own is not vh else basis
                signs = (own[: len(theirs)] * theirs).sum(1)
                torch.testing.assert_close(signs.abs(), torch.ones_like(signs), atol=1e-2, rtol=0)
                flip = torch.ones(len(vh)).index_copy(0, torch.arange(len(signs)), signs.sign())
                u, vh = u * flip, vh * flip[:, None]
            return u, vh
        raise AssertionError("a gradient that was not recorded")

    monkeypatch.setattr(subspace, "_svd", svd)


def replay(name, optimizer_class, monkeypatch, dtype=torch.float32, **kwargs):
    """Feed the recorded gradients to our class; return (ours, theirs) weights by parameter [T+1, ...]."""
    z = np.load(GOLDEN / f"{name}.npz")
    meta = json.loads(str(z["meta"]))
    follow_signs(monkeypatch, z, meta["projected"])
    names = meta["projected"] + meta["unprojected"]
    params = {n: torch.nn.Parameter(torch.tensor(z[f"{n}/init"]).to(dtype)) for n in names}
    options = dict(rank=meta["rank"], update_proj_gap=meta["update_proj_gap"], scale=meta["scale"])
    groups = [
        {"params": [params[n] for n in meta["unprojected"]]},
        {"params": [params[n] for n in meta["projected"]], "proj_type": meta["proj_type"], **options},
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rank .* clamped")
        optimizer = optimizer_class(groups, **({"lr": 0.0} | meta["opt_kw"] | kwargs))
    ours = {n: [params[n].detach().clone()] for n in names}
    for t, lr in enumerate(z["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        for n in names:
            params[n].grad = torch.tensor(z[f"{n}/grad"][t]).to(dtype)
        optimizer.step()
        for n in names:
            ours[n].append(params[n].detach().clone())
    return {n: (torch.stack(ours[n]).float(), torch.tensor(z[f"{n}/w"]).float()) for n in names}


def assert_followed(trajectories, tolerance):
    """Compare what `replay` returned, relative to the largest weight."""
    for ours, theirs in trajectories.values():
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
