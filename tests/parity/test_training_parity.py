"""One trajectory on any sharding: the same losses on 1, 2 and 3 processes, for the real training command."""

import itertools

import pytest
from tiny import launch

CASES = [*itertools.product(["galore", "adamw"], ["pad", "pack"]), ("gradnormlorp", "pack"), ("loro", "pack")]
PROJECTED = [("galore", "pack"), ("loro", "pack")]
WAYS_OF_FSDP = {"accumulate_unsharded": "true", "shard_columns": "false", "replicas": "2"}


def lines(bench, n_procs, engine, cases=CASES, **more):
    return [
        bench.options(
            f"{rule}-{sequences}-{engine}{n_procs}{''.join(more)}",
            optim__rule=rule,
            data__sequences=sequences,
            engine__kind=engine,
            optim__exact_every=7,
            # 12 sequences a step = 3 × 2 × 2 = 2 × 2 × 3 = 1 × 2 × 6: accumulation everywhere.
            **more,
        )
        for rule, sequences in cases
    ]


@pytest.fixture(scope="module")
def reference(bench):
    assert launch(1, lines(bench, 1, "local")) == [0] * len(CASES)
    return {(rule, seq): bench.losses(f"{rule}-{seq}-local1") for rule, seq in CASES}


def agree(bench, reference, n_procs, engine, more="", cases=CASES):
    for rule, sequences in cases:
        ours = bench.losses(f"{rule}-{sequences}-{engine}{n_procs}{more}")
        theirs = reference[rule, sequences]
        assert len(theirs) == 30
        assert theirs[30] < theirs[1] - 0.3  # it learns
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("n_procs", "engines"), [(2, ["fsdp", "ddp"]), (3, ["fsdp"])])
def test_losses_do_not_depend_on_the_layout(bench, reference, n_procs, engines):
    command_lines = [line for engine in engines for line in lines(bench, n_procs, engine)]
    ways = WAYS_OF_FSDP if n_procs == 2 else {}
    for option, value in ways.items():
        command_lines += lines(bench, 2, "fsdp", PROJECTED, **{f"engine__{option}": value})
    assert launch(n_procs, command_lines) == [0] * len(command_lines)
    for engine in engines:
        agree(bench, reference, n_procs, engine)
    for option in ways:
        agree(bench, reference, 2, "fsdp", f"engine__{option}", PROJECTED)


@pytest.mark.slow
def test_losses_do_not_depend_on_replicated_shards(bench, reference):
    command_lines = lines(bench, 4, "fsdp", engine__replicas="2", train__micro_batch=1)
    assert launch(4, command_lines) == [0] * len(command_lines)
    agree(bench, reference, 4, "fsdp", "engine__replicastrain__micro_batch")


@pytest.mark.slow  # test_walk.py moves every rule; this one starts the command, whose batches go on alike
def test_a_run_with_moments_of_eight_bits_goes_on_anywhere(bench):
    """On the same processes to the bit, on others to rounding."""

    def options(run, engine, **more):
        eight = dict(optim__moments="int8", optim__basis="bfloat16", data__sequences="pack")
        return bench.options(run, engine__kind=engine, **eight, train__keep_checkpoints=0, **more)

    assert launch(1, [options("eight", "local")]) == [0]
    assert launch(2, [options("eight-2", "fsdp", train__save_every=10)]) == [0]
    alone, together = bench.losses("eight"), bench.losses("eight-2")
    assert together == pytest.approx(alone, rel=1e-4)
    bench.forget_after("eight-2", 10)
    assert launch(2, [options("eight-2", "fsdp")]) == [0]
    assert bench.losses("eight-2") == together
    bench.forget_after("eight-2", 10)
    for engine, n_procs, step in (("zero", 3, 20), ("local", 1, 30)):
        assert launch(n_procs, [options("eight-2", engine, train__save_every=10)]) == [0]
        assert bench.losses("eight-2") == pytest.approx(alone, rel=1e-4)
        bench.forget_after("eight-2", step)


@pytest.mark.parametrize(
    "rule", ["galore", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("gradnormlorp", "loro"))]
)
def test_a_run_goes_on_with_another_engine_and_number_of_processes(bench, reference, rule):
    """Five steps on each, and on to the end."""
    moves = [("fsdp", 3, None), ("zero", 2, "zero3"), ("local", 1, None), ("zero", 3, "zero1")]
    for i, (engine, n_procs, ds_config) in enumerate(moves):
        argv = bench.options(
            f"moving-{rule}",
            optim__rule=rule,
            engine__kind=engine,
            engine__ds_config=ds_config,
            data__sequences="pack",
            train__save_every=5,
            train__keep_checkpoints=0,
            optim__exact_every=7,
        )
        assert launch(n_procs, [argv]) == [0]
        assert bench.losses(f"moving-{rule}") == pytest.approx(reference[rule, "pack"], rel=1e-4)
        bench.forget_after(f"moving-{rule}", 5 * i + 5)
