"""The tools through `lrpretrain.cli.main`, with what they write and the exit codes of what goes wrong."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hub_server import TRAIN, VALIDATION, FakeHub, c4_files, texts
from tiny import finish, launch

from lrpretrain import __version__, cli
from lrpretrain.data import tokenizer
from lrpretrain.data.sources import FileShards
from lrpretrain.data.tokens import TokenShards
from lrpretrain.sharding.placement import PLACEMENTS


@pytest.fixture(autouse=True)
def quiet_again():
    yield
    logging.getLogger("lrpretrain").setLevel(logging.NOTSET)


@pytest.fixture
def run(capsys):
    """Return a function that runs a tool and returns (exit code, stdout, stderr)."""

    def run(*argv):
        try:
            code = cli.main([str(a) for a in argv])
        except SystemExit as exit:  # argparse
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


TOOLS = ["show", "memory", "doctor", "tokenizer train", "tokenize", "download", "generate", "inspect"]
TOOLS += ["export", "eval", "compare", "report"]


@pytest.mark.parametrize("tool", ["", *TOOLS])
def test_help_names_the_default_of_every_option(run, tool):
    code, out, _ = run(*tool.split(), "--help")
    assert code == 0
    options = out.partition("options:")[2].split("\n  --")[1:]
    assert len(options) == (1 if not tool else out.count("\n  --"))
    for option in options:
        assert "(default: " in " ".join(option.split()) or option.split()[0] in (
            "no_validation",
            "version",
        ), option


def test_version_and_unknown_arguments(run):
    assert run("--version") == (0, f"{__version__}\n", "")
    assert run()[0] == 2
    code, _, err = run("download", "somewhere", "--shard_count", "3")
    assert code == 2
    assert "unrecognized arguments: --shard_count 3" in err
    code, _, err = run("tokenize", "somewhere", "--procs", "0")
    assert code == 2
    assert "argument --procs: '0' is not a whole number above 0" in err


def test_the_command_is_installed():
    command = [f"{sys.prefix}/bin/lrpretrain", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{__version__}\n"


def test_show(run):
    code, out, _ = run(
        "show", "llama_toy_galore", "--procs", 2, "--engine.kind", "fsdp", "--train.steps=7_000"
    )
    assert code == 0
    assert "steps: 7000" in out
    assert "2 processes × 8 micro-batch × 1 accumulation × 128 tokens = 2,048 tokens per step" in out


def test_memory(run):
    code, out, _ = run("memory", "--procs", "2,4", "--model.config", "llama_9m", "--optim.moments", "int8")
    header, _, *rows = out.splitlines()
    assert code == 0
    columns = [f"{n}: {name}" for n in (2, 4) for name in ("weights", "gradients", "state", "sent")]
    assert header == f"| GiB | {' | '.join(columns)} |"
    # adamw and loro have no moments of eight bits
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {rule} {place}" for rule in ("galore", "gradnormlorp") for place in PLACEMENTS
    ]
    code, out, err = run("memory", "--optim.rank", "100000", "--procs", 2)
    assert (code, out) == (2, "")
    assert "optim.rank=100000" in err
    code, _, err = run("memory", "--procs", "8,x")
    assert code == 2
    assert "argument --procs: 'x' is not a whole number above 0" in err


def test_show_one_field(run):
    argv = ["show", "llama_toy_galore", "--field", "run.dir", "--run.dir", "runs of mine/first"]
    assert run(*argv) == (0, "runs of mine/first\n", "")
    for name in ("run.folder", "runs.dir", "run", "run."):
        code, out, err = run("show", "llama_toy_galore", "--field", name)
        assert (code, out) == (2, "")
        assert f"--field {name} is not a field" in err


def test_show_says_all_that_is_wrong(run):
    code, out, err = run(
        "show", "llama_toy_galore", "--procs", 2, "--optim.rank", "100000", "--train.stepps", 5
    )
    assert (code, out) == (2, "")
    for part in ("3 problems", "engine.kind='local'", "optim.rank=100000", "Perhaps train.steps is meant"):
        assert part in err
    code, _, err = run("show", "no_such_recipe")
    assert code == 2
    assert "llama_toy_galore" in err


def test_train_a_tokenizer(run, bench, tmp_path):
    out = tmp_path / "new" / "spm.model"
    code, said, _ = run(
        "tokenizer", "train", out, "--path", bench.text, "--vocab_size", 290, "--max_chars", 9000
    )
    assert (code, said) == (0, f"wrote {out}: 290 ids\n")
    assert tokenizer.load(str(out), 290).size == 290


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [
        ("nowhere", 300, "no train shards"),
        ("text", 90000, "the text is too short for so many ids"),
        ("text", 10, "Raise the size to more than"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained(run, bench, tmp_path, path, size, message):
    out = tmp_path / "spm.model"
    code, _, err = run("tokenizer", "train", out, "--path", bench.folder / path, "--vocab_size", size)
    assert code == 3
    assert message in err
    assert not out.exists()


@pytest.fixture(scope="module")
def tokens(bench):
    """A folder of tokens of the bench's text, written by the tool in two processes."""
    out = bench.folder / "tokens"
    for split, procs in (("train", "2"), ("validation", "1")):
        argv = ["tokenize", out, "--path", bench.text, "--tokenizer", bench.tokenizer, "--vocab_size", 300]
        assert cli.main([str(a) for a in [*argv, "--split", split, "--procs", procs]]) == 0
    return out


def test_tokenize(bench, tokens):
    ids, source = tokenizer.load(str(bench.tokenizer), 300), FileShards(sorted(bench.text.glob("*train*")))
    shards = TokenShards(tokens, "train")
    for shard in range(4):
        expected = [ids.encode(text).tolist() for text in source.read(shard)]
        assert [document.tolist() for document in shards.read(shard)] == expected
    manifest = json.loads((tokens / "tokens.json").read_text())
    assert (manifest["pad"], manifest["eos"], manifest["vocab_size"]) == (0, 1, 290)
    assert manifest["tokenizer"] == ids.identity


def test_tokenize_the_embedded_corpus_with_its_own_tokenizer(run, monkeypatch, bench, tmp_path):
    monkeypatch.setattr("lrpretrain.data.sample.corpus", lambda cache: bench.text)
    monkeypatch.setattr("lrpretrain.data.sample.tokenizer", lambda cache: bench.tokenizer)
    code, said, _ = run("tokenize", tmp_path / "tokens", "--split", "validation")
    assert (code, said) == (0, f"wrote 1 shards of validation to {tmp_path / 'tokens'}\n")
    assert TokenShards(tmp_path / "tokens", "validation").counts == [60]


def test_tokenize_takes_names_of_the_hub(run, monkeypatch, bench, tmp_path):
    asked = []

    def load(spec, vocab_size):
        asked.append((spec, vocab_size))
        return real(str(bench.tokenizer), 300)

    real = tokenizer.load
    monkeypatch.setattr("lrpretrain.data.tokenizer.load", load)
    argv = ["--path", bench.text, "--tokenizer", "someone/t5-base", "--vocab_size", 300]
    assert run("tokenize", tmp_path / "tokens", *argv)[0] == 0
    assert asked == [("someone/t5-base", 300)]


def test_what_cannot_be_tokenized(run, bench, tmp_path):
    text, ids = ["--path", bench.text], ["--tokenizer", bench.tokenizer]
    (tmp_path / "file").write_text("")
    for code, message, argv in [
        (2, "--path needs --tokenizer", [tmp_path / "a", *text]),
        (2, "there is no such file", [tmp_path / "a", *text, "--tokenizer", "absent.model"]),
        (2, "it has 290 ids", [tmp_path / "a", *text, *ids, "--vocab_size", 200]),
        (3, "no train shards", [tmp_path / "a", "--path", tmp_path / "b", *ids]),
        (3, "File exists", [tmp_path / "file", *text, *ids]),
    ]:
        found, _, err = run("tokenize", *argv)
        assert (found, message in err) == (code, True), err
        assert err.startswith("lrpretrain: ")


def with_tokens(bench, name, folder, **more):
    options = {"data__tokenizer": None, "train__steps": 5, "data__source": "tokens", "data__path": folder}
    return bench.options(name, **{**options, **more})


@pytest.mark.parametrize("sequences", ["pad", "pack"])
def test_training_from_tokens_is_training_from_text(bench, tokens, sequences):
    common = {
        "train__steps": 5,
        "train__eval_every": 5,
        "train__eval_tokens": 2000,
        "data__sequences": sequences,
    }
    names = [f"{source}-{sequences}" for source in ("text", "tokens", "named")]
    lines = [
        bench.options(names[0], **common),
        with_tokens(bench, names[1], tokens, **common),
        with_tokens(bench, names[2], tokens, **common, data__tokenizer=bench.tokenizer, train__prompt="the"),
    ]
    assert launch(1, lines) == [0, 0, 0]
    text, *others = (
        [(e["step"], e.get("train/loss"), e.get("valid/loss"), e["tokens"]) for e in bench.metrics(name)]
        for name in names
    )
    assert [step for step, *_ in text] == [0, 1, 2, 3, 4, 5]
    assert others == [text, text]


def test_tokens_that_do_not_fit(bench, tokens, capfd):
    other = bench.folder / "other.model"
    tokenizer.train(FileShards(sorted(bench.text.glob("*train*"))).read(1), other, 285)
    elsewhere = bench.folder / "elsewhere"
    argv = ["tokenize", elsewhere, "--path", bench.text, "--tokenizer", other, "--vocab_size", 300]
    assert cli.main([str(a) for a in [*argv, "--split", "validation"]]) == 0
    small = bench.folder / "small.json"
    small.write_text(json.dumps(json.loads(bench.model.read_text()) | {"vocab_size": 256}))
    broken = bench.folder / "broken"
    shutil.copytree(tokens, broken)
    file = next(broken.glob("train-00001-*.tokens"))
    np.full(file.stat().st_size // 2, 295, np.uint16).tofile(file)
    both = [tokenizer.load(str(p), 300).identity for p in (other, bench.tokenizer)]
    cases = [
        (
            2,
            [f"data.tokenizer='{other}'", *both, "leave data.tokenizer out"],
            tokens,
            {"data__tokenizer": other},
        ),
        (2, ["data.tokenizer=None", both[1], "do without a prompt"], tokens, {"train__prompt": "the"}),
        (
            2,
            ["data.validation_path=", *both, "the same tokenizer"],
            tokens,
            {"data__validation_path": elsewhere},
        ),
        (3, ["is not in the vocabulary of 256", "model.config"], tokens, {"model__config": small}),
        (3, ["id 295 is not in the vocabulary of 290"], broken, {}),
        (3, ["tokens.json", "lrpretrain tokenize"], bench.text, {}),
    ]
    lines = [with_tokens(bench, f"unfit{i}", folder, **more) for i, (_, _, folder, more) in enumerate(cases)]
    capfd.readouterr()
    assert launch(1, lines) == [code for code, *_ in cases]
    assert [bench.status(f"unfit{i}")["exit_code"] for i in range(len(cases))] == [code for code, *_ in cases]
    said = capfd.readouterr().err
    assert said.count("lrpretrain: ") == len(cases)
    for _, parts, *_ in cases:
        assert all(part in said for part in parts), (parts, said)


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub(c4_files())
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr("lrpretrain.data.hub.random.uniform", lambda low, high: 0.02)
    yield fake
    fake.close()


def test_download(run, hub, tmp_path):
    hub.faults = {TRAIN[1]: [503, "drop"]}
    argv = ["download", tmp_path / "c4", "--dataset", "nobody/c4", "--shards", "0:2", "--patience_s", 5]
    code, said, _ = run(*argv)
    assert code == 0
    assert f"--data.source files --data.path {tmp_path / 'c4'}" in said
    shards = FileShards([tmp_path / "c4" / name for name in [*TRAIN[:2], *VALIDATION]])
    assert [list(shards.read(i)) for i in range(3)] == [texts(0), texts(1), texts("v")]
    assert run(*argv)[0] == 0
    assert (hub.requests[TRAIN[0]], hub.requests[VALIDATION[0]]) == (1, 1)


def test_download_without_validation(run, hub, tmp_path):
    argv = ["--dataset", "nobody/c4", "--shards", "3:4", "--no_validation"]
    assert run("download", tmp_path, *argv)[0] == 0
    assert [p.name for p in tmp_path.glob("*.gz")] == TRAIN[3:]


@pytest.mark.parametrize(
    ("code", "message", "argv"),
    [
        (2, "'4' is not a range. Write FIRST:END", ["--shards", "4"]),
        (2, "'4:4' is not a range", ["--shards", "4:4"]),
        (3, "has 4 shards of train", ["--shards", "2:9"]),
        (3, "404", ["--shards", "0:1", "--subset", "xx"]),
        (3, "gives up|data.hub_patience_s|HF_ENDPOINT|cannot", ["--shards", "0:1", "--patience_s", "0.1"]),
    ],
)
def test_downloads_that_fail(run, hub, tmp_path, code, message, argv):
    if "--patience_s" in argv:
        hub.faults = {"tree": [503] * 99}
    found, _, err = run("download", tmp_path / "c4", "--dataset", "nobody/c4", *argv)
    assert found == code, err
    assert any(part in err for part in message.split("|")), err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def trained(bench, tokens):
    """The folder of a run of three steps on tokens, without a tokenizer of its own."""
    argv = with_tokens(bench, "trained", tokens, train__steps=3, train__warmup_steps=1, optim__lr=0.05)
    code, output = finish(argv)
    assert code == 0, output
    return bench.folder / "trained"


def test_generate(run, bench, trained):
    argv = ["the gradient of", "--tokenizer", bench.tokenizer, "--tokens", 8]
    code, greedy, _ = run("generate", trained, *argv)
    assert code == 0
    assert greedy.startswith("the gradient of")
    assert len(greedy) > len("the gradient of\n")
    checkpoint = trained / "checkpoints" / "step_00000003"
    assert run("generate", checkpoint, *argv) == (0, greedy, "")
    bold = [run("generate", trained, *argv, "--temperature", 9, "--seed", seed)[1] for seed in (1, 2, 1)]
    assert bold[0] == bold[2]
    assert len({greedy, *bold}) == 3


def test_inspect(run, trained):
    checkpoint = trained / "checkpoints" / "step_00000003"
    code, out, err = run("inspect", trained)
    assert (code, err) == (0, "")
    assert run("inspect", checkpoint) == (0, out, "")
    assert out.startswith(f"{checkpoint}\nstep 3 of 3, ")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[3:12]}
    # 38,304 parameters; GaLore of rank 4 in 14 matrices, moments of the other 7 whole.
    assert rows["weights"] == ["float32", "21", "38,304", "153,216"]
    assert rows["exp_avg"] == rows["exp_avg_sq"] == ["float32", "21", "21,728", "86,912"]
    assert rows["basis"] == ["float32", "14", "1,792", "7,168"]
    assert "galore of rank 4" in out and "data: pass 1, 36 sequences into it" in out
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    size -= (checkpoint / "manifest.json").stat().st_size
    assert out.endswith(f"all 3 files ({size:,} bytes) are as they were written\n")


def test_inspect_names_what_is_wrong(run, trained, tmp_path):
    checkpoint = tmp_path / "step_00000003"
    shutil.copytree(trained / "checkpoints" / checkpoint.name, checkpoint)
    (checkpoint / "tensors" / "__0_0.distcp").write_bytes(b"")
    code, out, err = run("inspect", checkpoint)
    assert code == 4
    assert "weights" in out and "as they were written" not in out
    assert f"{checkpoint} is damaged: 1 of 3 files: tensors/__0_0.distcp is not as it was written" in err
    (checkpoint / "run.json").unlink()
    code, out, err = run("inspect", checkpoint)
    assert (code, out) == (4, "")
    assert "2 of 3 files: run.json is missing; tensors/__0_0.distcp" in err
    (checkpoint / "manifest.json").write_text('{"format": 99}')
    assert "has format 99" in run("inspect", checkpoint)[2]
    code, out, err = run("inspect", tmp_path)
    assert (code, out) == (4, "")
    assert "neither a checkpoint nor a run folder" in err


def test_generate_is_refused(run, bench, trained, tmp_path):
    ids = ["--tokenizer", bench.tokenizer]
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    next(damaged.glob("checkpoints/*/tensors/*.distcp")).write_bytes(b"")
    for code, message, argv in [
        (2, "Name the one that is sha256:", [trained, "the"]),
        (2, "PROMPT '' is empty", [trained, "", *ids]),
        (2, "there is no such file", [trained, "the", "--tokenizer", "absent.model"]),
        (4, "neither a checkpoint nor a run folder", [tmp_path, "the", *ids]),
        (4, "is damaged", [damaged, "the", *ids]),
    ]:
        found, out, err = run("generate", *argv)
        assert (found, out, message in err) == (code, "", True), err
