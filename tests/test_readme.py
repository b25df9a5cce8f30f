"""The README says what is so: its commands work, its fields exist, its table lists what can be chosen."""

import functools
import re
import shlex
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from test_recipes import processes
from tiny import ROOT
from transformers import RobertaConfig

from lrpretrain import __version__, cli, config, finetune
from lrpretrain.authors import glue, pretraining
from lrpretrain.compare import BASE, Comparison
from lrpretrain.finetune import _export_of
from lrpretrain.model import classifier
from lrpretrain.train import plan

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


def train(line, procs):
    """Read the command line of a training and check it for the processes that it would have."""
    words = shlex.split(line)
    (start,) = (i for i, word in enumerate(words) if re.match(r"lrpretrain\.(pretrain$|authors\.)", word))
    parse = config.parse
    if "authors" in words[start]:
        parse = functools.partial(pretraining.read, words[start].removeprefix("lrpretrain.authors."))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(procs))
        read, problems = parse(words[start + 1 :])
    assert [*problems, *plan.problems(read, procs)] == []


def finetuning(line):
    """Read the command line of a fine-tuning; test_finetune.py runs the recipes and each method."""
    words = shlex.split(line)
    _, rest = _export_of(words[words.index("lrpretrain.finetune") + 1 :])
    read, problems = config.parse(rest, kind=config.FinetuneConfig)
    slots = read.train.micro_batch * number(line, "--nproc-per-node")
    assert problems == [] and read.train.global_batch % slots == 0


def translation(line):
    """Translate a line of the authors, without writing the file that it names."""
    line, _, path = line.partition(" --to_config ")
    assert path.endswith(".yaml")
    train(line, 1)


def classification(line):
    """Translate a line of the authors for GLUE, and check it on RoBERTa's shape; nothing is downloaded."""
    words = shlex.split(line)
    found, problems = glue.read(words[2].split(".")[-1].removesuffix("_glue"), words[3:])
    assert found.model.init_from == "roberta-base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "shape_of", lambda *_: RobertaConfig(max_position_embeddings=514))
        assert [*problems, *finetune.check(found, 1)[1]] == []


def number(line, option):
    words = shlex.split(line)
    return int(words[words.index(option) + 1]) if option in words else 1


def torchrun(line):
    from torch.distributed.run import parse_args

    parse_args(shlex.split(line)[1:])
    if "lrpretrain.finetune" in line:
        finetuning(line)
    else:
        train(line, number(line, "--nnodes") * number(line, "--nproc-per-node"))


def deepspeed(line):
    from deepspeed.launcher.runner import parse_args

    assert parse_args(shlex.split(line)[1:]).user_script == "lrpretrain.pretrain"
    train(line, number(line, "--num_gpus"))


def tool(line):
    """Read the arguments of a tool; what is left over is a configuration's, for the tool that takes one."""
    known, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
    if known.run is cli.show:
        assert cli.main(shlex.split(line)[1:]) == 0
    else:
        assert rest == []


def script(line):
    _, path, *options = shlex.split(line)
    assert subprocess.run(["bash", "-n", ROOT / path], check=True).returncode == 0
    assert options == [] or (path, *options) in {("launch/environment.sh", x) for x in ("report", "glue")}


def exists(line):
    """See that a command of the environment is there; its options are of others."""
    words = shlex.split(line)
    name = words[1] if words[0] == "source" else f".venv/bin/{words[0]}"
    assert (Path(sys.prefix) / Path(name).relative_to(".venv")).is_file()


def launcher(line):
    """Read the recipe and settings that a launch script gets; test_launch_scripts.py starts such scripts."""
    _, path, recipe, *options = shlex.split(line)
    assert subprocess.run(["bash", "-n", ROOT / path], check=True).returncode == 0
    engine = {"fsdp.sh": "fsdp", "zero.sh": "zero"}[Path(path).name]
    read, problems = config.parse(["--config", recipe, "--engine.kind", engine, *options])
    assert [*problems, *plan.problems(read, 2)] == []


def doctor(line):
    """Read the configuration that the doctor gets; test_doctor.py runs it."""
    read, problems = config.parse(shlex.split(line)[2:])
    assert [*problems, *plan.problems(read, 2)] == []


def tabulated(line):
    """See that its table follows, which test_a_table_is_what_its_command_prints compares."""
    assert f"{line}\n```\n\n| GiB |" in README


def comparison(line):
    """Read what a comparison gets, and check every run of it; test_compare.py runs some."""
    known, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
    assert known.run is cli.compare
    base = [] if "--config" in rest else BASE
    read, problems = config.parse([*base, *rest])
    compared = Comparison(read, known.rules, known.lrs, known.seeds, known.out)
    assert [*problems, *compared.problems(known.procs or 1)] == []


def evaluation(line):
    """Read what an evaluation gets; test_export.py runs some."""
    known, rest = cli.build_parser().parse_known_args(shlex.split(line)[1:])
    assert known.run is cli.evaluate
    assert config.parse(rest)[1] == []


# How a command is tried, by how it begins. The scripts run in test_launch.py, and run.sh around us.
TRIED = {
    "bash launch/quickstart.sh": script,
    "bash launch/environment.sh": script,
    "bash tests/run.sh": script,
    "bash launch/fsdp.sh ": launcher,
    "bash launch/zero.sh ": launcher,
    "lrpretrain doctor ": doctor,
    "lrpretrain memory ": tabulated,
    "lrpretrain eval ": evaluation,
    "lrpretrain compare ": comparison,
    "source .venv/bin/activate": exists,
    "tensorboard --logdir ": exists,
    "python -m lrpretrain.pretrain ": lambda line: train(line, 1),
    "python -m lrpretrain.authors.gradnormlorp_glue ": classification,
    "python -m lrpretrain.authors.loro_glue ": classification,
    "python -m lrpretrain.finetune ": finetuning,
    "python -m lrpretrain.authors.": translation,
    "torchrun ": torchrun,
    "deepspeed ": deepspeed,
    "lrpretrain ": tool,
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_works(line):
    tries = [how for prefix, how in TRIED.items() if line.startswith(prefix)]
    assert tries, f"the README has a command that no test knows: {line}"
    tries[0](line)


@pytest.mark.parametrize(
    ("line", "table"), re.findall(r"^```bash\n(lrpretrain memory .*)\n```\n\n((?:\|.*\n)+)", README, re.M)
)
def test_a_table_is_what_its_command_prints(line, table, capsys):
    assert cli.main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out == table


def test_every_way_to_try_is_used():
    assert [p for p in TRIED if not any(line.startswith(p) for line in COMMANDS)] == []


@pytest.mark.parametrize("block", blocks("python"))
def test_an_example_runs(block):
    exec(block, {})


def test_every_field_exists():
    sections = {section.name for section in fields(config.Config)}
    named = re.findall(rf"\b({'|'.join(sections)})\.(\w+)", README)
    known = {
        (section.name, field.name)
        for kind in (config.Config, config.FinetuneConfig)
        for section in fields(kind)
        for field in fields(section.default_factory)
    }
    wrong = set(named) - {("run", "sh"), ("run", "json")} - known
    assert len(named) > 40
    assert wrong == set()


def test_the_table_lists_what_can_be_chosen():
    rules = typing.get_args(typing.get_type_hints(config.OptimConfig)["rule"])
    engines = typing.get_args(typing.get_type_hints(config.EngineConfig)["kind"])
    header, _, *rows = re.findall(
        r"^\|.*\|$", README.partition("## What runs where")[2].partition("##")[0], re.M
    )
    assert re.findall(r"`(\w+)`", header) == list(engines)
    assert sorted(re.match(r"\| `(\w+)`", row)[1] for row in rows) == sorted(rules)
    for row in rows:
        rule = re.match(r"\| `(\w+)`", row)[1]
        cases = [{"optim": {"rule": rule}, "engine": {"kind": engine}} for engine in engines]
        refused = [
            bool(plan.check(config.from_dict(case), 1 + (engine != "local")))
            for case, engine in zip(cases, engines, strict=True)
        ]
        assert row.count("| refused") == sum(refused) and row.count("| yes") == len(engines) - sum(refused)


def test_the_recipes_are_those_that_are_shipped():
    listed = {}
    for size, row in re.findall(
        r"^\| `(\w+)` \| (.* \d.*) \|$", README.partition("papers' recipes")[2], re.M
    ):
        listed |= {f"llama_{size}_{name}": int(gpus) for name, gpus in re.findall(r"`(\w+)` (\d+)", row)}
    listed |= dict.fromkeys(re.findall(r"`(roberta_base_mrpc_\w+)`", README), 1)
    assert listed == {name: processes(name) for name in config.shipped_names("recipes")}


def test_exit_codes_are_those_of_the_errors():
    from lrpretrain import errors

    said = README.partition("Exit codes: ")[2].split(";")[0]
    kinds = [errors.ConfigError, errors.DataError, errors.CheckpointError, errors.UnsoundError]
    codes = [0, *(kind.exit_code for kind in kinds), errors.EXIT_STOPPED, 1]
    assert [int(code) for code in re.findall(r"\b\d+\b", said)] == codes


def test_the_state_of_the_1b_model():
    line = next(line for line in COMMANDS if "llama_1b" in line)
    read, _ = config.parse(shlex.split(line)[shlex.split(line).index("lrpretrain.pretrain") + 1 :])
    for rule in ("galore", "adamw"):
        read.optim.rule = rule
        (numbers,) = re.findall(r"= ([\d,]+) numbers,", plan.describe(read, 8))
        assert numbers in README


def test_links_and_companions():
    for name in re.findall(r"`((?:launch|tests|lrpretrain)/[\w./]+|[A-Z]+(?:\.cff)?)`", README):
        assert (ROOT / name).exists() or name.isupper(), name
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == __version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert changelog.index("## [Unreleased]") < changelog.index(__version__)
