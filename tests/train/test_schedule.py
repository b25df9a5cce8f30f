"""The learning rate against a recorded schedule, and the shapes of the others."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrpretrain.config import Config, TrainConfig
from lrpretrain.train.plan import check
from lrpretrain.train.schedule import RESTARTING, lr_ratio

GOLDEN = Path(__file__).parents[1] / "golden"
FROM_ZERO = ["linear", "cosine", "wsd", "cosine_restart_zero"]
SCHEDULES = [*FROM_ZERO, "cosine_restart"]


def curve(**options):
    """Return the ratios of all updates of a run."""
    train = TrainConfig(**options)
    assert [p for p in check(Config(train=train), 1) if p.field.startswith("train.")] == []
    return np.array([lr_ratio(step, train) for step in range(train.steps)])


def test_cosine_equals_the_authors():
    theirs = np.load(GOLDEN / "lr_schedules.npz")["galore_cosine_60m"][:10000]
    ours = curve(schedule="cosine", steps=10000, warmup_steps=1000, min_lr_ratio=0.1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


LORO = dict(steps=10000, warmup_steps=1000, min_lr_ratio=0.1, restart_every=500, peak_delay_steps=1000)


@pytest.mark.parametrize("jag", ["", "_jag"])
@pytest.mark.parametrize(
    ("schedule", "name"), [("cosine_restart", "restart"), ("cosine_restart_zero", "restart_zero")]
)
def test_restarts_equal_loros_script(schedule, name, jag):
    theirs = np.load(GOLDEN / "lr_schedules.npz")[f"loro_{name}_60m{jag}"][:10000]
    options = LORO | dict(schedule=schedule, restart_in_warmup=not jag)
    np.testing.assert_allclose(curve(**options, restart_at="compat"), theirs, rtol=0, atol=1e-12)
    # Tied to the refreshes the rest is theirs; their ramps happen to lie there, but for the one at step 1000.
    ours = curve(**options)
    assert list(np.flatnonzero(abs(ours - theirs) > 1e-12)) == list(range(1000, 1005))


def test_ramps_follow_the_refreshes_also_where_the_script_has_none():
    """LORO's settings for 350M: moments are zeroed at 2000, 2500 … 6000 with the full rate after."""
    options = dict(steps=60000, warmup_steps=2000, restart_every=500, peak_delay_steps=6000)
    ours, theirs = (
        curve(schedule="cosine_restart", **options, restart_at=at) for at in ("refresh", "compat")
    )
    dips = {name: np.flatnonzero(ratios < 1e-5) for name, ratios in (("ours", ours), ("theirs", theirs))}
    assert dips["ours"].tolist() == list(range(500, 60000, 500))
    assert dips["theirs"].tolist() == [500, 1000, 1500, *range(6500, 60000, 500)]
    assert abs(ours.argmax() - 8000) <= 5  # 6000 steps after the warm-up
    shifted = dict(options, restart_every=700)
    assert np.flatnonzero(curve(schedule="cosine_restart", **shifted) < 1e-5).tolist() == list(
        range(700, 60000, 700)
    )


@pytest.mark.parametrize("schedule", FROM_ZERO)
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
    ratios = curve(schedule="cosine_restart_zero", restart_every=30, restart_warmup_steps=4, **options)
    expected = cosine.copy()
    for restart in (30, 60, 90):
        expected[restart : restart + 4] = cosine[restart] * np.array([0.1, 0.325, 0.55, 0.775])
    np.testing.assert_allclose(ratios, expected, atol=1e-12)


def test_ramps_in_the_warm_up_can_be_left_out():
    options = dict(schedule="cosine_restart_zero", steps=100, warmup_steps=50, restart_every=20)
    assert (curve(**options)[[20, 40]] < [0.05, 0.09]).all()
    ratios = curve(restart_in_warmup=False, **options)
    np.testing.assert_allclose(ratios[:50], np.arange(50) / 50)
    assert ratios[60] == pytest.approx(0.1 * curve(schedule="cosine", steps=100, warmup_steps=50)[60])


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
        restart_at=draw(st.sampled_from(["refresh", "compat"])),
        restart_in_warmup=draw(st.booleans()),
        peak_delay_steps=draw(st.integers(0, steps - warmup)),
    )


@settings(deadline=None, max_examples=300)
@given(schedules(), st.data())
def test_always_between_zero_and_the_peak(train, data):
    step = data.draw(st.integers(0, train.steps - 1))
    ratio = lr_ratio(step, train)
    assert 0 <= ratio <= 1
    if step >= train.warmup_steps and train.schedule not in RESTARTING:
        assert ratio >= train.min_lr_ratio * (1 - 1e-12)
