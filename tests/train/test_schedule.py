"""The learning rate against a recorded schedule, and the shapes of the others."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpretrain.config import Config, TrainConfig
from lrpretrain.train.plan import check
from lrpretrain.train.schedule import lr_ratio

GOLDEN = Path(__file__).parents[1] / "golden"
SCHEDULES = ["linear", "cosine", "wsd", "cosine_restart"]


def curve(**options):
    """Return the ratios of all updates of a run."""
    train = TrainConfig(**options)
    assert [p for p in check(Config(train=train), 1) if p.field.startswith("train.")] == []
    return np.array([lr_ratio(step, train) for step in range(train.steps)])


def test_cosine_equals_the_authors():
    theirs = np.load(GOLDEN / "lr_schedules.npz")["galore_cosine_60m"][:10000]
    ours = curve(schedule="cosine", steps=10000, warmup_steps=1000, min_lr_ratio=0.1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_a_line_from_zero(schedule):
    ratios = curve(schedule=schedule, steps=100, warmup_steps=20, restart_every=50)
    np.testing.assert_allclose(ratios[:21], np.arange(21) / 20, atol=1e-12)
    assert lr_ratio(0, TrainConfig(schedule=schedule, steps=10, warmup_steps=0, restart_every=5)) == 1


def test_linear_is_a_line_down():
    ratios = curve(schedule="linear", steps=100, warmup_steps=20, min_lr_ratio=0.25)
    np.testing.assert_allclose(ratios[20:], 1 - 0.75 * np.arange(80) / 80, atol=1e-12)
    assert ratios[-1] == pytest.approx(0.25 + 0.75 / 80)


def test_cosine_is_half_a_wave():
    ratios = curve(schedule="cosine", steps=120, warmup_steps=20, min_lr_ratio=0.2)
    assert ratios[20] == 1 and ratios[70] == pytest.approx(0.6)
    assert ratios[45] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    np.testing.assert_allclose(ratios[21:120] + ratios[119:20:-1], 1.2)  # point-symmetric about its middle
    assert (np.diff(ratios[20:]) < 0).all() and 0.2 < ratios[-1] < 0.201


@pytest.mark.parametrize(("decay_steps", "decay"), [(30, 30), (None, 20), (1, 1), (80, 80)])
def test_wsd_is_flat_and_then_a_line_down(decay_steps, decay):
    ratios = curve(schedule="wsd", steps=100, warmup_steps=20, min_lr_ratio=0.1, decay_steps=decay_steps)
    assert (ratios[20 : 100 - decay + 1] == 1).all()
    np.testing.assert_allclose(ratios[100 - decay :], 1 - 0.9 * np.arange(decay) / decay)


def test_restarts_ramp_up_to_the_cosine():
    options = dict(steps=100, warmup_steps=10, min_lr_ratio=0.1)
    cosine = curve(schedule="cosine", **options)
    ratios = curve(schedule="cosine_restart", restart_every=30, restart_warmup_steps=4, **options)
    parts = ratios / np.where(cosine > 0, cosine, 1)
    expected = np.ones(100)
    expected[0] = 0  # the warm-up begins at 0
    for restart in (30, 60, 90):
        expected[restart : restart + 4] = np.array([1, 2, 3, 4]) / 5
    np.testing.assert_allclose(parts, expected, atol=1e-12)


def test_the_warm_up_has_no_restarts():
    ratios = curve(schedule="cosine_restart", steps=100, warmup_steps=50, restart_every=20)
    np.testing.assert_allclose(ratios[:50], np.arange(50) / 50)
    assert ratios[60] == pytest.approx(curve(schedule="cosine", steps=100, warmup_steps=50)[60] / 6)


@st.composite
def schedules(draw):
    """Draw any schedule that a valid configuration can have."""
    steps = draw(st.integers(1, 10**6))
    warmup = draw(st.integers(0, steps - 1))
    return TrainConfig(
        steps=steps,
        warmup_steps=warmup,
        schedule=draw(st.sampled_from(SCHEDULES)),
        min_lr_ratio=draw(st.floats(0, 1)),
        decay_steps=draw(st.none() | st.integers(1, steps - warmup)),
        restart_every=draw(st.integers(1, 2 * steps)),
        restart_warmup_steps=draw(st.integers(0, 20)),
    )


@settings(deadline=None, max_examples=300)
@given(schedules(), st.data())
def test_always_between_zero_and_the_peak(train, data):
    step = data.draw(st.integers(0, train.steps - 1))
    ratio = lr_ratio(step, train)
    assert 0 <= ratio <= 1
    if step >= train.warmup_steps and train.schedule != "cosine_restart":
        assert ratio >= train.min_lr_ratio * (1 - 1e-12)
