"""The small messages between processes, over gloo and without."""

import numpy as np
from spawn import spawn

from lrpretrain.sharding.procs import Procs


def exchange():
    procs = Procs.of_default_group()
    me, other = procs.proc, 1 - procs.proc
    procs.barrier()
    # The first sends two rows, the second none; later the other way round, and one to itself.
    there = procs.swap({other: np.arange(6).reshape(2, 3)} if procs.is_first else {}, 3)
    back = procs.swap({} if procs.is_first else {0: np.full((1, 3), 7), 1: np.full((1, 3), 8)}, 3)
    return {
        "n_procs": procs.n_procs,
        "sum": procs.sum([1, me, -me]).tolist(),
        "max": procs.max([1, me, -me]).tolist(),
        "gather": procs.gather({"proc": me}),
        "there": there.tolist(),
        "back": back.tolist(),
    }


def test_two_processes():
    first, second = spawn(exchange, 2)
    for result in (first, second):
        assert result["n_procs"] == 2
        assert result["sum"] == [2, 1, -1]
        assert result["max"] == [1, 1, 0]
        assert result["gather"] == [{"proc": 0}, {"proc": 1}]
    assert (first["there"], second["there"]) == ([], [[0, 1, 2], [3, 4, 5]])
    assert (first["back"], second["back"]) == ([[7, 7, 7]], [[8, 8, 8]])


def test_single_process_talks_to_itself():
    procs = Procs.of_default_group()
    assert (procs.proc, procs.n_procs, procs.is_first) == (0, 1, True)
    assert procs.sum([1, 2]).tolist() == procs.max([1, 2]).tolist() == [1, 2]
    assert procs.gather("x") == ["x"]
    assert procs.swap({0: np.ones((2, 3), np.int64)}, 3).tolist() == [[1, 1, 1]] * 2
    assert procs.swap({}, 3).shape == (0, 3)
    procs.barrier()
