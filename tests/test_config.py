"""Reading a configuration: precedence, everything wrong at once, and what `check` refuses."""

import json
from dataclasses import asdict

import pytest
import yaml

from lrpretrain.config import Config, find_shipped, from_dict, parse, shipped_names, to_yaml
from lrpretrain.errors import ConfigError
from lrpretrain.train.plan import check

PURE = {"params": "bfloat16", "compute": "bfloat16"}


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a configuration file and returns its path."""

    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def read(*argv):
    """Return the configuration of a command line without problems."""
    config, problems = parse([str(a) for a in argv])
    assert problems == []
    return config


def refused(*argv):
    """Return the problems of a command line as lines, and the configuration that remains."""
    config, problems = parse([str(a) for a in argv])
    return [str(p) for p in problems], config


def test_defaults_then_file_then_command_line(file):
    path = file("optim:\n  rank: 7\n  scale: 0.5\n")
    for argv in (["--config", path, "--optim.rank", "9"], ["--optim.rank=9", f"--config={path}"]):
        config = read(*argv)
        assert (config.optim.rank, config.optim.scale, config.optim.refresh_every) == (9, 0.5, 200)
    assert read() == Config()


def test_later_settings_win(file, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("optim: {rank: 8}\n")
    config = read(
        "--config", file("optim: {rank: 7, scale: 0.5}"), "--config", second, "--run.dir=a", "--run.dir=b"
    )
    assert (config.optim.rank, config.optim.scale, config.run.dir) == (8, 0.5, "b")


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_file_is_the_defaults(file, text):
    assert read("--config", file(text)) == Config()


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("optim: {lr: 1e-3}", "lr", 1e-3),
        ("optim: {lr: 2}", "lr", 2.0),
        ("optim: {eps: 1E-8}", "eps", 1e-8),
        ("optim: {betas: [9e-1, 0.99]}", "betas", (0.9, 0.99)),
        ("optim: {attn_rank: null}", "attn_rank", None),
        ("optim: {targets: ['*.q_proj']}", "targets", ["*.q_proj"]),
    ],
)
def test_yaml_values_take_the_fields_type(file, text, field, value):
    found = getattr(read("--config", file(text)).optim, field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("option", "value", "found"),
    [
        ("optim.betas", "[0.5,0.75]", (0.5, 0.75)),
        ("optim.betas", "[0.5, 0.75]", (0.5, 0.75)),
        ("optim.targets", '["*.q_proj", "*.k_proj"]', ["*.q_proj", "*.k_proj"]),
        ("optim.lr", "1e-3", 1e-3),
        ("data.document_mask", "true", True),
        ("data.epochs", "null", None),
        ("model.config", "60", "60"),
        ("train.prompt", "Once: {upon", "Once: {upon"),
        ("train.prompt", "a=b", "a=b"),
    ],
)
def test_values_from_the_command_line(option, value, found):
    section, name = option.split(".")
    for argv in ([f"--{option}", value], [f"--{option}={value}"]):
        assert getattr(getattr(read(*argv), section), name) == found


@pytest.mark.parametrize("spelling", ["local_rank", "local-rank"])
def test_the_launchers_local_rank_is_ignored(spelling):
    assert read("--optim.rank=3", f"--{spelling}=1").optim.rank == 3
    assert read(f"--{spelling}", "1", "--optim.rank=3").optim.rank == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--optim.rnk", "3"],
            ["optim.rnk='3'", "unknown key in the command line", "Perhaps optim.rank is meant"],
        ),
        (["--zzz", "3"], ["zzz='3'", "unknown key", "`--help`"]),
        (["--optim", "3"], ["optim='3'", "unknown key"]),
        (
            ["--optim.rank", "many"],
            ["optim.rank='many'", "expected int", "the command line", "of that type"],
        ),
        (["--optim.rank", "3.5"], ["optim.rank='3.5'", "expected int"]),
        (["--optim.betas", "0.5"], ["optim.betas='0.5'", "expected tuple"]),
        (["--data.source", "web"], ["data.source='web'", "'sample', 'files', 'hub', 'tokens'"]),
        (["--optim.lr", "null"], ["optim.lr='null'", "expected float"]),
        (["--optim.rank"], ["optim.rank=None", "has no value", "--optim.rank VALUE"]),
        (["optim.rank=3"], ["'optim.rank=3' is not an option", "--section.field VALUE"]),
        (
            ["--config", "nowhere.yaml"],
            ["config='nowhere.yaml'", "neither a file nor a recipe", "llama_toy_galore"],
        ),
    ],
)
def test_a_command_line_that_cannot_be_read(argv, words):
    (line,), config = refused(*argv)
    assert all(word in line for word in words), line
    assert config == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {rnk: 3}", ["optim.rnk=3", "unknown key in ", "config.yaml", "Perhaps optim.rank is meant"]),
        ("optim: {rank: 1e3}", ["optim.rank='1e3'", "expected int", "config.yaml"]),
        ("optim: {lr: fast}", ["optim.lr='fast'", "expected float"]),
        ("optim: {targets: a}", ["optim.targets='a'", "expected list"]),
        ("nonsense: {a: 1}", ["nonsense.a=1", "unknown key"]),
        ("1: {a: 1}", ["1.a=1", "unknown key"]),
        ("train: 3", ["train=3", "is not a section of fields in ", "config.yaml", "Indent"]),
        ("train:", ["train=None", "is not a section"]),
        ("- optim", ["config=", "config.yaml", "is not a mapping of sections", "Write `section:`"]),
        ("optim", ["config=", "is not a mapping of sections"]),
        ("optim: [", ["config=", "cannot be read", "line 1", "Mend the file"]),
        ("\x00", ["config=", "cannot be read", "Mend the file"]),
    ],
)
def test_a_file_that_cannot_be_read(file, text, words):
    (line,), config = refused("--config", file(text))
    assert all(word in line for word in words), line
    assert config == Config()


def test_a_file_of_other_bytes_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00a")
    (line,), _ = refused("--config", path)
    assert "cannot be read" in line


def test_everything_wrong_is_reported_at_once_and_the_rest_is_read(file):
    path = file("optim: {rnk: 3, lr: fast, rank: 5}\ntrain: 3\nfoo: {a: 1}\n")
    lines, config = refused(
        "--config", path, "stray", "--data.lanes", "some", "--run.dir", "here", "--data.path"
    )
    starts = [
        "'stray'",
        "data.path=None",
        "optim.rnk=3",
        "optim.lr='fast'",
        "train=3",
        "foo.a=1",
        "data.lanes='some'",
    ]
    assert sorted(line.split(":")[0].split(" ")[0] for line in lines) == sorted(starts)
    assert (config.optim.rank, config.run.dir) == (5, "here")


UNUSUAL = {
    "optim": {
        "betas": [0.5, 0.25],
        "targets": ["*.a", "b: c"],
        "lr": 1e-7,
        "attn_rank": 3,
        "subspace": "svd",
    },
    "data": {"path": "123", "document_mask": True, "epochs": 2},
    "train": {"prompt": "a: b # c é\n'\"", "clip_norm": 1},
    "run": {"dir": "null"},
}


@pytest.mark.parametrize("values", [{}, UNUSUAL])
def test_yaml_reads_back_equal(file, values):
    config = from_dict(values)
    text = to_yaml(config)
    assert read("--config", file(text)) == config
    written = yaml.safe_load(text)
    assert {s: list(fields) for s, fields in written.items()} == {
        s: list(v) for s, v in asdict(config).items()
    }


def test_a_dictionary_reads_back_equal():
    config = from_dict(UNUSUAL)
    assert (config.optim.betas, config.data.path, config.optim.rank) == ((0.5, 0.25), "123", 128)
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config


def test_print_config_writes_a_commented_file_that_is_a_config(file, capsys):
    argv = ["--config", "llama_toy_galore", "--optim.rank=9"]
    with pytest.raises(SystemExit) as stop:
        parse(["--print_config", *argv])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert read("--config", file(text)) == read(*argv)
    assert (
        "# Rank of the projection, or of the low-rank weights (loro). (type: int, default: 128)\n  rank: 9"
        in text
    )
    assert "# Which optimizer\noptim:" in text


def test_print_config_of_what_cannot_be_read_is_an_error(capsys):
    with pytest.raises(
        ConfigError, match=r"2 problems in the configuration:\n  - optim.rnk=.*\n  - data.lanes="
    ):
        parse(["--optim.rnk=3", "--data.lanes=x", "--print_config"])
    assert capsys.readouterr().out == ""


def test_help_groups_the_fields_by_section(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], prog="the_program")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "the_program" in text and "Which optimizer" in text
    words = " ".join(text.split())
    assert "--optim.rank RANK Rank of the projection, or of the low-rank weights (loro). (type: int" in words


def test_find_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = find_shipped("model_configs", "llama_60m")
    assert (
        by_name
        == find_shipped("model_configs", "llama_60m.json")
        == find_shipped("model_configs", str(by_name))
    )
    assert by_name.name == "llama_60m.json"
    assert find_shipped("recipes", "llama_toy_galore").name == "llama_toy_galore.yaml"
    assert find_shipped("ds_configs", "zero2").name == "zero2.json"
    for kind, name in (
        ("model_configs", "llama_2b"),
        ("recipes", "llama_60m"),
        ("recipes", ""),
        ("recipes", "."),
    ):
        assert find_shipped(kind, name) is None
    (tmp_path / "llama_60m").write_text("{}")
    assert find_shipped("model_configs", "llama_60m").read_text() == "{}", "a file of that name comes first"
    assert {"llama_60m", "llama_7b", "llama_toy"} <= set(shipped_names("model_configs"))


def test_defaults_and_valid_combinations_have_no_problems():
    assert check(Config(), 1) == []
    for values, n_procs in (
        ({"engine": {"kind": "fsdp"}, "precision": {"compute": "bfloat16"}}, 1),
        ({"engine": {"kind": "fsdp", "accumulate_unsharded": True}}, 8),
        ({"engine": {"kind": "fsdp", "reshard_after_forward": False, "prefetch_blocks": 2}}, 8),
        ({"model": {"checkpointing": "selective", "checkpoint_every": 2, "loss_chunk": 0}}, 1),
        ({"engine": {"kind": "ddp"}, "precision": {"compute": "bfloat16", "params": "bfloat16"}}, 2),
        ({"engine": {"kind": "zero", "ds_config": "zero3"}, "precision": {"compute": "bfloat16"}}, 2),
        ({"engine": {"kind": "zero"}}, 1),
        ({"data": {"sequences": "pack", "document_mask": True, "seq_len": 2}}, 1),
        ({"data": {"source": "hub", "tokenizer": "t5-base", "path": None}}, 1),
        ({"data": {"source": "tokens", "path": "folder", "tokenizer": None}}, 1),
        ({"train": {"schedule": "wsd", "steps": 100, "warmup_steps": 10, "decay_steps": 90}}, 1),
        ({"train": {"schedule": "cosine_restart", "restart_every": 1}}, 1),
        ({"train": {"decay_steps": 0, "restart_every": 0}}, 1),  # of other schedules
        ({"train": {"save_every": 500, "keep_every": 1500}}, 1),
        ({"train": {"eval_every": 0, "save_every": 0, "keep_checkpoints": 0, "warmup_steps": 0}}, 1),
        ({"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn"}, "engine": {"kind": "ddp"}}, 2),
        ({"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn"}, "engine": {"kind": "fsdp"}}, 1),
        ({"optim": {"rule": "galore", "base": "adafactor"}, "engine": {"kind": "ddp"}}, 2),
        ({"optim": {"rule": "gradnormlorp", "mode": "dora"}, "model": {"init_from": "folder"}}, 1),
        ({"optim": {"moments": "int8", "basis": "bfloat16"}, "engine": {"kind": "zero"}}, 2),
        ({"optim": {"rule": "gradnormlorp", "moments": "int8"}, "precision": PURE}, 1),
        ({"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn", "moments": "bfloat16"}}, 1),
        ({"optim": {"rule": "loro", "moments": "bfloat16"}, "engine": {"kind": "zero"}}, 2),
        ({"optim": {"rule": "adamw", "moments": "float32"}, "precision": PURE}, 1),
        ({"optim": {"base": "adafactor", "moments": "float32", "basis": "bfloat16"}}, 1),
        ({"optim": {"rule": "adamw", "moments": "int8"}, "engine": {"kind": "ddp"}}, 2),
        ({"optim": {"rule": "sgd", "momentum": 0.9, "moments": "bfloat16"}}, 1),
        ({"optim": {"rule": "adafactor", "momentum": 0.9}, "engine": {"kind": "ddp"}}, 2),
        ({"optim": {"rule": "gradnormlorp", "base": "adafactor"}}, 1),
        (
            {
                "optim": {"rule": "factored", "refresh_moments_every": 20},
                "train": {"schedule": "cosine_restart", "restart_every": 20},
                "engine": {"kind": "zero"},
            },
            2,
        ),
        ({"optim": {"betas": [0, 0.5], "weight_decay": 0, "lr_regular": 1e-9}}, 1),
    ):
        assert check(from_dict(values), n_procs) == [], values


NAN = float("nan")
OUT_OF_RANGE = {
    "model.checkpoint_every": [0],
    "model.loss_chunk": [-1],
    "engine.prefetch_blocks": [-1],
    "data.seq_len": [0, -1, 1],
    "data.lanes": [0],
    "data.prefetch": [0],
    "data.workers": [0],
    "data.epochs": [0, -1],
    "optim.lr": [0.0, -1.0, NAN],
    "optim.lr_regular": [0.0, -1.0],
    "optim.eps": [0.0, -1e-8],
    "optim.betas": [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)],
    "optim.weight_decay": [-0.1],
    "optim.rank": [0, -4],
    "optim.attn_rank": [0],
    "optim.mlp_rank": [-1],
    "optim.refresh_every": [0],
    "optim.adapter_rank": [0],
    "optim.refresh_moments_every": [0],
    "optim.adapter_alpha": [0.0],
    "train.micro_batch": [0],
    "train.log_every": [0],
    "train.eval_tokens": [0],
    "train.eval_every": [-1],
    "train.save_every": [-1],
    "train.keep_checkpoints": [-1],
    "train.keep_every": [-1, 1500],
    "train.warmup_steps": [-1],
    "train.profile_steps": [-1],
    "train.profile_from": [-1],
    "train.min_lr_ratio": [-0.1, 1.1, NAN],
    "train.clip_norm": [0.0, -1.0, NAN],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in OUT_OF_RANGE.items() for v in values])
def test_values_out_of_range_are_refused(key, value):
    section, name = key.split(".")
    config = Config()
    setattr(getattr(config, section), name, value)
    assert_refused(config, 1, [key])


TOGETHER = {
    "steps below 1": ({"train": {"steps": 0}}, 1, ["train.steps", "train.warmup_steps"]),
    "no batch": ({"train": {"global_batch": 0}}, 1, ["train.global_batch"]),
    "warm-up as long as the run": ({"train": {"steps": 10, "warmup_steps": 10}}, 1, ["train.warmup_steps"]),
    "decay longer than what is left": (
        {"train": {"schedule": "wsd", "steps": 100, "warmup_steps": 10, "decay_steps": 91}},
        1,
        ["train.decay_steps"],
    ),
    "decay of no steps": ({"train": {"schedule": "wsd", "decay_steps": 0}}, 1, ["train.decay_steps"]),
    "restarts without a period": ({"train": {"schedule": "cosine_restart"}}, 1, ["train.restart_every"]),
    "restarts with no period": (
        {"train": {"schedule": "cosine_restart", "restart_every": 0}},
        1,
        ["train.restart_every"],
    ),
    "batch that cannot be split": ({"train": {"global_batch": 500}}, 1, ["train.global_batch"]),
    "batch that three cannot split": ({"engine": {"kind": "ddp"}}, 3, ["train.global_batch"]),
    "checkpoints to keep, and none but the last": (
        {"train": {"save_every": 0, "keep_every": 1000}},
        1,
        ["train.keep_every"],
    ),
    "local in two processes": ({}, 2, ["engine.kind"]),
    "accumulation of whole gradients": (
        {"engine": {"accumulate_unsharded": True}},
        1,
        ["engine.accumulate_unsharded"],
    ),
    "choices of FSDP2 under ZeRO": (
        {"engine": {"kind": "zero", "reshard_after_forward": False, "prefetch_blocks": 1}},
        2,
        ["engine.reshard_after_forward", "engine.prefetch_blocks"],
    ),
    "every second block of none": ({"model": {"checkpoint_every": 2}}, 1, ["model.checkpoint_every"]),
    "mixed precision without fsdp": ({"precision": {"compute": "bfloat16"}}, 1, ["precision.compute"]),
    "float32 over bfloat16": (
        {"precision": {"params": "bfloat16"}, "engine": {"kind": "fsdp"}},
        1,
        ["precision.compute"],
    ),
    "bfloat16 weights under ZeRO": (
        {"precision": {"params": "bfloat16", "compute": "bfloat16"}, "engine": {"kind": "zero"}},
        1,
        ["precision.params"],
    ),
    "bfloat16 weights under ZeRO, float32 arithmetic": (
        {"precision": {"params": "bfloat16"}, "engine": {"kind": "zero"}},
        1,
        ["precision.params"],
    ),
    "replicas under ZeRO": ({"engine": {"kind": "zero", "replicas": 2}}, 2, ["engine.replicas"]),
    "settings of DeepSpeed for another engine": (
        {"engine": {"kind": "fsdp", "ds_config": "zero2"}},
        2,
        ["engine.ds_config"],
    ),
    "a mode of another rule": ({"optim": {"rule": "galore", "mode": "lowrank_wn"}}, 1, ["optim.mode"]),
    "a mode for whole matrices, cut": (
        {"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn"}, "engine": {"kind": "fsdp"}},
        2,
        ["optim.mode"],
    ),
    "a mode for whole matrices, in flat buffers": (
        {"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn"}, "engine": {"kind": "zero"}},
        1,
        ["optim.mode"],
    ),
    "adafactor under another rule": ({"optim": {"rule": "loro", "base": "adafactor"}}, 1, ["optim.base"]),
    "adafactor in pieces, and with rotated moments": (
        {"optim": {"base": "adafactor", "moments_at_refresh": "rotate"}, "engine": {"kind": "fsdp"}},
        2,
        ["optim.base", "optim.moments_at_refresh"],
    ),
    "adafactor in flat buffers": (
        {"optim": {"base": "adafactor"}, "engine": {"kind": "zero"}},
        1,
        ["optim.base"],
    ),
    "a base of no projection": ({"optim": {"rule": "adafactor", "base": "adafactor"}}, 1, ["optim.base"]),
    "sgd in pieces, and momentum of Adam": (
        {"optim": {"rule": "sgd", "moments": "int8"}, "engine": {"kind": "zero"}},
        1,
        ["optim.rule", "optim.moments"],
    ),
    "adafactor in pieces, of few moments": (
        {"optim": {"rule": "adafactor", "moments": "bfloat16"}, "engine": {"kind": "fsdp"}},
        2,
        ["optim.rule", "optim.moments"],
    ),
    "momentum beside Adam's": ({"optim": {"momentum": 0.9}}, 1, ["optim.momentum"]),
    "momentum without end": ({"optim": {"rule": "sgd", "momentum": 1.0}}, 1, ["optim.momentum"]),
    "ramps apart from refreshes": (
        {"optim": {"rule": "loro"}, "train": {"schedule": "cosine_restart", "restart_every": 250}},
        1,
        ["train.restart_every"],
    ),
    "a peak after the end": (
        {"train": {"schedule": "cosine_restart_zero", "restart_every": 5, "peak_delay_steps": 9001}},
        1,
        ["train.peak_delay_steps"],
    ),
    "eight bits without a projection": (
        {"optim": {"rule": "adamw", "moments": "int8", "basis": "bfloat16"}, "engine": {"kind": "fsdp"}},
        2,
        ["optim.moments", "optim.basis"],
    ),
    "eight bits of factors": ({"optim": {"rule": "loro", "moments": "int8"}}, 1, ["optim.moments"]),
    "eight bits in the authors' mode": (
        {"optim": {"rule": "gradnormlorp", "mode": "lowrank_wn", "moments": "int8"}},
        1,
        ["optim.moments"],
    ),
    "eight bits of adafactor": ({"optim": {"base": "adafactor", "moments": "int8"}}, 1, ["optim.moments"]),
    "adapters of no weights": ({"optim": {"rule": "gradnormlorp", "mode": "dora"}}, 1, ["model.init_from"]),
    "factors of dense weights": (
        {"optim": {"rule": "loro"}, "model": {"init_from": "folder"}},
        1,
        ["model.init_from"],
    ),
    "a profile of steps that never come": (
        {"train": {"profile_steps": 1, "profile_from": 10_000}},
        1,
        ["train.profile_from"],
    ),
    "a mask of padded rows": ({"data": {"document_mask": True}}, 1, ["data.document_mask"]),
    "files without a path": ({"data": {"source": "files", "tokenizer": "a"}}, 1, ["data.path"]),
    "tokens without a path": ({"data": {"source": "tokens"}}, 1, ["data.path"]),
    "a path of the embedded corpus": ({"data": {"path": "a"}}, 1, ["data.path"]),
    "files without a tokenizer": ({"data": {"source": "files", "path": "a"}}, 1, ["data.tokenizer"]),
    "the hub without a tokenizer": ({"data": {"source": "hub"}}, 1, ["data.tokenizer"]),
    "several": (
        {"optim": {"rank": 0, "lr": -1}, "data": {"lanes": 0}},
        2,
        ["optim.rank", "optim.lr", "data.lanes", "engine.kind"],
    ),
}


@pytest.mark.parametrize(("values", "n_procs", "keys"), TOGETHER.values(), ids=TOGETHER)
def test_combinations_that_cannot_work_are_refused(values, n_procs, keys):
    assert_refused(from_dict(values), n_procs, keys)


def test_compilation_needs_a_compiler(monkeypatch):
    config = from_dict({"engine": {"compile": True}})
    monkeypatch.setenv("CXX", "sh")
    assert check(config, 1) == []
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_refused(config, 1, ["engine.compile"])


def assert_refused(config, n_procs, keys):
    """Assert that exactly these fields are refused, each with its value, a reason and a remedy."""
    problems = check(config, n_procs)
    assert sorted(p.field for p in problems) == sorted(keys)
    for problem in problems:
        section, name = problem.field.split(".")
        assert str(problem).startswith(f"{problem.field}={getattr(getattr(config, section), name)!r}: ")
        assert problem.reason and problem.remedy
        assert str(problem).endswith(f"{problem.reason}. {problem.remedy}.")


def test_the_remedies_of_numbers_work():
    (problem,) = check(
        from_dict({"train": {"global_batch": 500, "micro_batch": 7}, "engine": {"kind": "fsdp"}}), 4
    )
    assert problem.remedy.startswith("Use 476,")
    assert (
        check(from_dict({"train": {"global_batch": 476, "micro_batch": 7}, "engine": {"kind": "fsdp"}}), 4)
        == []
    )
    config = Config()
    config.optim.betas = (2.0, 2.0)
    (problem,) = check(config, 1)
    assert check(read("--optim.betas", problem.remedy.removeprefix("Use ")), 1) == []


def test_an_error_counts_and_lists_its_problems():
    assert str(ConfigError(["a"])) == "1 problem in the configuration:\n  - a"
    assert str(ConfigError(check(from_dict({"optim": {"rank": 0}, "train": {"log_every": 0}}), 1))) == (
        "2 problems in the configuration:\n"
        "  - optim.rank=0: must be at least 1. Raise it.\n"
        "  - train.log_every=0: must be at least 1. Raise it."
    )
