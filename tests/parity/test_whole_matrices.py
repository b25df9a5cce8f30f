"""What needs whole matrices: the same losses on one process and on two under DDP, and after a resume."""

import pytest
from tiny import launch

CASES = {
    "lowrank_wn": {"optim__rule": "gradnormlorp", "optim__mode": "lowrank_wn"},
    "adafactor": {"optim__rule": "galore", "optim__base": "adafactor"},
}


def test_losses_do_not_depend_on_the_number_of_processes(bench):
    def line(case, engine, **more):
        return bench.options(f"{case}-{engine}", engine__kind=engine, **CASES[case], **more)

    assert launch(1, [line(case, "local", train__save_every=10) for case in CASES]) == [0] * len(CASES)
    reference = {case: bench.losses(f"{case}-local") for case in CASES}
    assert launch(2, [line(case, "ddp") for case in CASES]) == [0] * len(CASES)
    for case in CASES:
        theirs = reference[case]
        assert theirs[30] < theirs[1] - 0.3  # it learns
        assert bench.losses(f"{case}-ddp") == pytest.approx(theirs, rel=1e-4)
        bench.forget_after(f"{case}-local", 10)
    assert launch(1, [line(case, "local") for case in CASES]) == [0] * len(CASES)
    for case in CASES:
        assert bench.losses(f"{case}-local") == reference[case]  # to the bit
