"""The tools beside training: `lrpretrain show | memory | doctor | bench | compare | export | eval | …`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lrpretrain import __version__
from lrpretrain.config import Config, DataConfig
from lrpretrain.errors import ConfigError, DamageError, DataError, LrpretrainError

MODEL = "a checkpoint, a run folder for its newest one, or a model in the Hugging Face format"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool; return its exit code: 0, 1 doctor, bench, 2 configuration, 3 data, disk, 4 checkpoint.

    `compare` ends with 75 when a signal stops it.
    """
    parser = build_parser()
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest and known.run not in (show, memory, doctor, bench_train, compare, evaluate):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.overrides = rest
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lrpretrain").setLevel(logging.INFO)  # tools that take minutes tell how far they are
    try:
        known.run(known)
    except LrpretrainError as error:
        print(f"lrpretrain: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a folder that cannot be written to, a full disk
        print(f"lrpretrain: {error}", file=sys.stderr)
        return DataError.exit_code
    return 0


def show(args: argparse.Namespace) -> None:
    """Print a configuration's resolved values and what they amount to."""
    from lrpretrain import config
    from lrpretrain.train import plan

    read, problems = config.parse(["--config", args.file, *args.overrides], prog="lrpretrain show FILE")
    problems += plan.problems(read, args.procs)
    section, _, name = (args.field or "").partition(".")
    if args.field and not hasattr(getattr(read, section, None), name):
        problems.append(f"--field {args.field} is not a field. `lrpretrain.pretrain --help` lists them.")
    if problems:
        raise ConfigError(problems)
    if args.field:
        print(getattr(getattr(read, section), name))
    else:
        print(config.to_yaml(read))
        print(plan.describe(read, args.procs))


def memory(args: argparse.Namespace) -> None:
    """Print what every rule and placement asks of a process, by the number of processes."""
    from lrpretrain import config
    from lrpretrain.train import plan

    read, problems = config.parse(["--engine.kind", "fsdp", *args.overrides], prog="lrpretrain memory")
    if problems:
        raise ConfigError(problems)
    print(plan.table(read, args.procs))


def doctor(args: argparse.Namespace) -> None:
    """Check this node, and a few steps of a configuration's rule and engine; print a table."""
    import torch

    from lrpretrain import config
    from lrpretrain.doctor import Check, examine
    from lrpretrain.train import plan

    engine = [] if any(a.startswith("--config") for a in args.overrides) else ["--engine.kind", "fsdp"]
    read, problems = config.parse([*engine, *args.overrides], prog="lrpretrain doctor")
    all_ = 1 if read.engine.kind == "local" else torch.cuda.device_count() or 2
    n_procs = args.procs or all_
    problems += plan.problems(read, n_procs)
    if problems:
        raise ConfigError(problems)
    print(Check("check", "state", "found"))
    failed = 0
    for check in examine(read, n_procs, args.patience_s):
        print(check, flush=True)
        failed += check.state == "failed"
    if failed:
        raise LrpretrainError(f"{failed} of the checks failed")


def bench_train(args: argparse.Namespace) -> None:
    """Measure variants of a configuration's training on this node; print a table."""
    import torch

    from lrpretrain import bench, config
    from lrpretrain.train import plan

    n_procs = args.procs or torch.cuda.device_count() or 1
    base = [*bench.BASE, f"--train.global_batch={bench.SEQUENCES * n_procs}"]
    given = {argument.partition("=")[0] for argument in args.overrides}
    read, problems = config.parse(
        [*([] if "--config" in given else base), *args.overrides], prog="lrpretrain bench train"
    )
    varied = {"optim.rule": "rules", "engine.compile": "compile", "model.checkpointing": "checkpointing"}
    problems += [
        f"--{key} is varied here. Use --{option}." for key, option in varied.items() if f"--{key}" in given
    ]
    chosen = bench.variants(args.rules, args.compile, args.checkpointing)
    for variant in chosen:
        problems += [p for p in plan.problems(variant.of(read), n_procs) if p not in problems]
    if problems:
        raise ConfigError(problems)
    failed = []
    for line, wrong in bench.compare(read, chosen, n_procs, args.steps, args.patience_s):
        print(line, flush=True)
        failed += [wrong] if wrong else []
    if failed:
        raise LrpretrainError("\n".join(failed))


def compare(args: argparse.Namespace) -> None:
    """Train several rules by one configuration, and report which is better."""
    import torch

    from lrpretrain import config, report
    from lrpretrain.compare import BASE, VARIED, Comparison

    given = {argument.partition("=")[0] for argument in args.overrides}
    base = [] if "--config" in given else BASE
    read, problems = config.parse([*base, *args.overrides], prog="lrpretrain compare")
    varied = {key: option for key, option in VARIED.items() if f"--{key}" in given}
    problems += [f"--{key} is varied here. Use {option}." for key, option in varied.items()]
    n_procs = args.procs or (1 if read.engine.kind == "local" else torch.cuda.device_count() or 1)
    comparison = Comparison(read, args.rules, args.lrs, args.seeds, args.out)
    problems += [problem for problem in comparison.problems(n_procs) if problem not in problems]
    if problems:
        raise ConfigError(problems)
    report.canvas()  # rather now than after the training
    runs, failed = comparison.train(n_procs)
    print(f"{report.write(runs, args.out)}\n\nwrote {args.out / 'report.md'} and report.png")
    if failed:
        raise LrpretrainError("\n".join(failed))


def report_runs(args: argparse.Namespace) -> None:
    """Report runs beside each other."""
    from lrpretrain import report

    runs = [report.read(path) for path in args.runs]
    print(f"{report.write(runs, args.out)}\n\nwrote {args.out / 'report.md'} and report.png")


def train_tokenizer(args: argparse.Namespace) -> None:
    """Train a sentencepiece tokenizer on the documents of C4-format shards or of the embedded corpus."""
    from lrpretrain.data import tokenizer
    from lrpretrain.data.inputs import open_source

    source = open_source(_text(args), "train")
    texts = (str(document) for shard in range(len(source.names)) for document in source.read(shard))
    tokenizer.train(texts, args.out, args.vocab_size, max_chars=args.max_chars)
    print(f"wrote {args.out}: {args.vocab_size} ids")


def tokenize(args: argparse.Namespace) -> None:
    """Write pre-tokenised shards."""
    from lrpretrain.data import tokens
    from lrpretrain.data.inputs import open_source, open_tokenizer

    data = _text(args)
    if args.path and not args.tokenizer:
        raise ConfigError(["--path needs --tokenizer. Name a .model file or a tokenizer of the hub."])
    source = open_source(data, args.split)
    ids = open_tokenizer(Config(data=data), args.vocab_size)
    tokens.tokenize(source, source.names, ids, args.out, args.split, processes=args.procs)
    print(f"wrote {len(source.names)} shards of {args.split} to {args.out}")


def download(args: argparse.Namespace) -> None:
    """Fetch shards of a data set of the hub into a folder; run again, it goes on."""
    from lrpretrain.data import hub

    first, _, last = args.shards.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError([f"--shards {args.shards!r} is not a range. Write FIRST:END, such as 0:64."])
    shards = range(int(first), int(last))
    wants = {"validation": not args.no_validation, "patience_s": args.patience_s}
    hub.download(args.dataset, args.subset, shards, args.folder, **wants)
    print(f"{args.folder} is complete; train with --data.source files --data.path {args.folder}")


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt with a trained model."""
    import torch

    from lrpretrain.train import trained

    found = trained.find(args.checkpoint)
    found.config.data.tokenizer = args.tokenizer or found.config.data.tokenizer
    ids = found.tokenizer()
    model = found.model()
    torch.manual_seed(args.seed)
    prompt = torch.from_numpy(ids.encode(args.prompt)[None, :-1])  # without the eos
    sampling = {"temperature": args.temperature} if args.temperature > 0 else {}
    if not prompt.numel():
        raise ConfigError([f"PROMPT {args.prompt!r} is empty. Give some text to continue."])
    written = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.tokens,
        eos_token_id=ids.eos_id,
        pad_token_id=ids.pad_id,
        use_cache=True,
        do_sample=bool(sampling),
        **sampling,
    )
    print(ids.decode(written[0].tolist()))


def inspect(args: argparse.Namespace) -> None:
    """Print what is in a checkpoint, and compare its files with what was written."""
    from lrpretrain.artifacts import checkpoint, report
    from lrpretrain.sharding.procs import Procs

    path = checkpoint.newest(args.checkpoint)
    wrong = checkpoint.verify(path, Procs())
    files = checkpoint.read_manifest(path)["files"]
    if wrong.keys().isdisjoint(("run.json", checkpoint.INDEX)):
        print(report.describe(path))
    if wrong:
        what = "; ".join(f"{name} {what}" for name, what in sorted(wrong.items()))
        remedy = "A run that goes on from here takes the checkpoint before it"
        raise DamageError(f"{path} is damaged: {len(wrong)} of {len(files)} files: {what}. {remedy}.")
    size = sum(file["bytes"] for file in files.values())
    print(f"all {len(files)} files ({size:,} bytes) are as they were written")


def export(args: argparse.Namespace) -> None:
    """Write a trained model in the Hugging Face format."""
    import torch

    from lrpretrain.artifacts.export import export, refuse_taken
    from lrpretrain.train import trained

    refuse_taken(args.out)
    found = trained.find(args.checkpoint)
    found.config.data.tokenizer = args.tokenizer or found.config.data.tokenizer
    tokenizer = None if args.no_tokenizer else found.tokenizer()
    dtype = args.dtype or found.config.precision.params
    wants = {"form": args.form, "dtype": getattr(torch, dtype), "shard_size": args.shard_size}
    export(found.model(), found.shape, tokenizer, args.out, **wants)
    print(f"wrote {args.out}: the model of {found.path}, {args.form}, in {dtype}")


def evaluate(args: argparse.Namespace) -> None:
    """Print the perplexity of a trained model on validation data."""
    from lrpretrain.engine.device import pick_device
    from lrpretrain.train import trained

    model = trained.find(args.model)
    tokens = [f"--train.eval_tokens={args.tokens}"] if args.tokens else []
    trained.configure(model, [*args.overrides, *tokens])
    found = trained.evaluate(model, pick_device())
    if args.json:
        print(json.dumps({"model": str(model.path), "data.source": model.config.data.source, **found}))
        return
    print(f"{model.path} on {found['valid/targets']:,} tokens of data.source={model.config.data.source}")
    for name, ppl, loss, how in (
        ("perplexity", "valid/ppl", "valid/loss", "every token counts the same"),
        (
            "of the papers' scripts",
            "valid/biased_ppl",
            "valid/biased_loss",
            "sum of the micro-batches' means, divided by their number + 1",
        ),
    ):
        print(f"{name:24}{found[ppl]:10.4f}   loss {found[loss]:.6f}   {how}")


def _text(args: argparse.Namespace) -> DataConfig:
    """Return the data that the options --path and, where the tool has it, --tokenizer mean."""
    tokenizer = getattr(args, "tokenizer", None)
    return DataConfig(source="files" if args.path else "sample", path=args.path, tokenizer=tokenizer)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tools; what it reads holds the tool as `run`."""
    parser = argparse.ArgumentParser(
        prog="lrpretrain",
        description="Tools around pretraining. `lrpretrain TOOL --help` explains one.",
        epilog="Training itself is `python -m lrpretrain.pretrain --help`. "
        "Exit codes: 0 done, 1 a check of the doctor or a measurement failed, 2 configuration, "
        "3 data or disk, 4 checkpoint, 75 stopped by a signal (compare).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    tools = parser.add_subparsers(required=True, metavar="TOOL", title="tools")
    _add_show(tools)
    _add_memory(tools)
    _add_doctor(tools)
    _add_bench(tools)
    _add_compare(tools)
    _add_report(tools)
    _add_tokenizer(tools)
    _add_tokenize(tools)
    _add_download(tools)
    _add_generate(tools)
    _add_inspect(tools)
    _add_export(tools)
    _add_eval(tools)
    return parser


def _add(tools, name: str, run, about: str, **options) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    tool: argparse.ArgumentParser = tools.add_parser(name, help=about, description=about, **options)
    tool.set_defaults(run=run)
    return tool


def _count(text: str) -> int:
    """Read a number of things; argparse says which option it was for."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _add_show(tools) -> None:  # type: ignore[no-untyped-def]
    usage = "lrpretrain show FILE [--procs N] [--field SECTION.FIELD] [--section.field VALUE ...]"
    about = "print a configuration's resolved values and what they amount to, or all that is wrong with it"
    # Without abbreviations: what is not an option of this tool is a field of the configuration.
    tool = _add(tools, "show", show, about, usage=usage, allow_abbrev=False)
    tool.add_argument("file", metavar="FILE", help="a recipe's name or a YAML file")
    procs = "processes that the run will have (default: %(default)s)"
    tool.add_argument("--procs", type=_count, default=1, help=procs)
    field = "print the value of this field only, for scripts (default: all fields)"
    tool.add_argument("--field", metavar="SECTION.FIELD", help=field)


def _add_memory(tools) -> None:  # type: ignore[no-untyped-def]
    usage = "lrpretrain memory [--procs N,N,...] [--section.field VALUE ...]"
    about = "print a table of what every rule and placement takes of memory and sends, without training"
    tool = _add(tools, "memory", memory, about, usage=usage, allow_abbrev=False)
    procs = "processes, a group of columns for each (default: 8,64,256)"
    tool.add_argument("--procs", type=_counts, default=[8, 64, 256], help=procs)


def _add_doctor(tools) -> None:  # type: ignore[no-untyped-def]
    usage = "lrpretrain doctor [--config FILE] [--procs N] [--patience_s S] [--section.field VALUE ...]"
    about = "check this node, and a few steps of a small model in all processes against one"
    tool = _add(tools, "doctor", doctor, about, usage=usage, allow_abbrev=False)
    procs = "processes to start (default: one for each GPU, or 2 on a CPU; 1 for engine.kind=local)"
    tool.add_argument("--procs", type=_count, help=procs)
    patience = "seconds that they have for it (default: %(default)s)"
    tool.add_argument("--patience_s", type=float, default=600.0, help=patience)


def _add_bench(tools) -> None:  # type: ignore[no-untyped-def]
    group = tools.add_parser(
        "bench", help="measure speed and memory", description="Measure speed and memory."
    )
    usage = "lrpretrain bench train [--config FILE] [options] [--section.field VALUE ...]"
    about = (
        "train on random tokens: rule × compiling × checkpointing, each for a few steps in new processes; "
        "print a Markdown table (default: 1B in bfloat16 over float32 weights under FSDP2)"
    )
    actions = group.add_subparsers(required=True, metavar="ACTION")
    tool = _add(actions, "train", bench_train, about, usage=usage, allow_abbrev=False)
    choices = {
        "rules": (["adamw", "galore", "gradnormlorp", "loro"], ["adamw", "galore", "loro"]),
        "compile": (["off", "on"], ["off", "on"]),
        "checkpointing": (["none", "selective", "full"], ["none", "selective"]),
    }
    for name, (possible, default) in choices.items():
        which = f"of {', '.join(possible)} (default: {' '.join(default)})"
        tool.add_argument(f"--{name}", nargs="+", choices=possible, default=default, help=which, metavar="X")
    steps = "steps that are measured, after 4 to warm up; every 4th refreshes (default: %(default)s)"
    tool.add_argument("--steps", type=_count, default=12, help=steps)
    procs = "processes of a variant (default: one for each GPU, or 1 on a CPU)"
    tool.add_argument("--procs", type=_count, help=procs)
    patience = "seconds that a variant has (default: %(default)s)"
    tool.add_argument("--patience_s", type=float, default=1800.0, help=patience)


def _add_compare(tools) -> None:  # type: ignore[no-untyped-def]
    usage = "lrpretrain compare [--config FILE] [options] [--section.field VALUE ...]"
    about = (
        "train rules by one configuration, each at the best of a few learning rates with several seeds, and "
        "write a table and curves; run again, it goes on (default: the recipe llama_toy_galore)"
    )
    tool = _add(tools, "compare", compare, about, usage=usage, allow_abbrev=False)
    default = ["adamw", "galore", "gradnormlorp", "loro", "factored"]
    rules = f"values of optim.rule (default: {','.join(default)})"
    tool.add_argument(
        "--rules", type=lambda text: text.split(","), default=default, help=rules, metavar="X,X"
    )
    lrs = "values of optim.lr; the lowest seed chooses one for each rule (default: 0.003,0.01,0.03)"
    tool.add_argument("--lrs", type=_numbers, default=[0.003, 0.01, 0.03], help=lrs, metavar="X,X")
    seeds = "values of train.seed; the lowest for every learning rate, all for the best one (default: 0,1)"
    tool.add_argument("--seeds", type=_seeds, default=[0, 1], help=seeds, metavar="N,N")
    procs = "processes of a run (default: one for each GPU, or 1 on a CPU; 1 for engine.kind=local)"
    tool.add_argument("--procs", type=_count, help=procs)
    out = "folder of the report and of the run folders RULE_lrX_seedN (default: %(default)s)"
    tool.add_argument("--out", type=Path, default=Path("runs/compare"), help=out)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas between") from error


def _seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return [int(part) for part in text.split(",")]


def _add_report(tools) -> None:  # type: ignore[no-untyped-def]
    about = "write a table and curves of runs: a rule's with several seeds at the best learning rate"
    tool = _add(tools, "report", report_runs, about)
    tool.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    out = "the folder to write (default: %(default)s)"
    tool.add_argument("--out", type=Path, default=Path("runs/report"), help=out)


def _add_tokenizer(tools) -> None:  # type: ignore[no-untyped-def]
    group = tools.add_parser("tokenizer", help="make a tokenizer", description="Make a tokenizer.")
    about = "train a sentencepiece BPE model on text (ids: pad 0, eos 1, unknown 2)"
    tool = _add(group.add_subparsers(required=True, metavar="ACTION"), "train", train_tokenizer, about)
    tool.add_argument("out", type=Path, metavar="OUT", help="the .model file to write")
    tool.add_argument("--path", help="folder or glob of C4-format shards (default: the embedded corpus)")
    tool.add_argument(
        "--vocab_size", type=_count, default=32000, help="ids that it has (default: %(default)s)"
    )
    most = "characters of text that it learns from, at most (default: %(default)s)"
    tool.add_argument("--max_chars", type=_count, default=50_000_000, help=most)


def _add_tokenize(tools) -> None:  # type: ignore[no-untyped-def]
    about = "write pre-tokenised shards for data.source=tokens; run again, it goes on"
    tool = _add(tools, "tokenize", tokenize, about)
    tool.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it takes both splits")
    tool.add_argument("--path", help="folder or glob of C4-format shards (default: the embedded corpus)")
    which = "a .model file, or a tokenizer of the hub such as t5-base (default: the embedded corpus's own)"
    tool.add_argument("--tokenizer", help=which)
    which = "which shards of --path to write (default: %(default)s)"
    tool.add_argument("--split", choices=["train", "validation"], default="train", help=which)
    size = "ids that the model has; a tokenizer with more is refused (default: %(default)s)"
    tool.add_argument("--vocab_size", type=_count, default=32000, help=size)
    procs = "processes that share the shards (default: %(default)s)"
    tool.add_argument("--procs", type=_count, default=1, help=procs)


def _add_download(tools) -> None:  # type: ignore[no-untyped-def]
    about = "fetch shards of C4 from the hub, for machines without internet; run again, it goes on"
    tool = _add(tools, "download", download, about)
    tool.add_argument("folder", type=Path, metavar="FOLDER", help="where to put them")
    which = "training shards FIRST:END, END not included (default: %(default)s)"
    tool.add_argument("--shards", default="0:64", help=which)
    tool.add_argument("--no_validation", action="store_true", help="leave out the validation shards")
    tool.add_argument("--dataset", default="allenai/c4", help="data set of the hub (default: %(default)s)")
    tool.add_argument("--subset", default="en", help="its folder with the shards (default: %(default)s)")
    patience = "seconds without a byte before it gives up (default: %(default)s)"
    tool.add_argument("--patience_s", type=float, default=600.0, help=patience)


def _add_generate(tools) -> None:  # type: ignore[no-untyped-def]
    tool = _add(tools, "generate", generate, "continue a prompt with a trained model, on the CPU")
    tool.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=MODEL)
    tool.add_argument("prompt", metavar="PROMPT", help="text to continue")
    tool.add_argument("--tokens", type=_count, default=64, help="new tokens, at most (default: %(default)s)")
    heat = "0 takes the most likely token, more is bolder (default: %(default)s)"
    tool.add_argument("--temperature", type=float, default=0.0, help=heat)
    seed = "of the sampling, where the temperature is above 0 (default: %(default)s)"
    tool.add_argument("--seed", type=int, default=0, help=seed)
    tool.add_argument("--tokenizer", help="a .model file or a tokenizer of the hub (default: the run's own)")


def _add_inspect(tools) -> None:  # type: ignore[no-untyped-def]
    tool = _add(tools, "inspect", inspect, "print what is in a checkpoint, and verify its files")
    which = "a checkpoint, or a run folder for its newest one"
    tool.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=which)


def _add_export(tools) -> None:  # type: ignore[no-untyped-def]
    tool = _add(tools, "export", export, "write a trained model in the Hugging Face format")
    tool.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=MODEL)
    tool.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    form = "dense: for transformers, low-rank factors and adapters merged; factored: LORO's factors as they "
    form += "are, for lrpretrain.model.llama.from_pretrained (default: %(default)s)"
    tool.add_argument("--form", choices=["dense", "factored"], default="dense", help=form)
    floats = "of the weights (default: the run's precision.params)"
    tool.add_argument("--dtype", choices=["float32", "bfloat16"], help=floats)
    size = "of a file of weights, at most (default: %(default)s)"
    tool.add_argument("--shard_size", type=_size, default="5GB", help=size)
    tool.add_argument("--tokenizer", help="a .model file or a tokenizer of the hub (default: the run's own)")
    without = "write no files of a tokenizer (default: those that AutoTokenizer loads)"
    tool.add_argument("--no_tokenizer", action="store_true", help=without)


def _size(text: str) -> str:
    """Read a size such as 5GB; argparse says which option it was for."""
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return text


def _add_eval(tools) -> None:  # type: ignore[no-untyped-def]
    usage = "lrpretrain eval MODEL [--tokens N] [--json] [--section.field VALUE ...]"
    about = "measure the perplexity of a trained model on validation data, by default that of its run"
    tool = _add(tools, "eval", evaluate, about, usage=usage, allow_abbrev=False)
    tool.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    tokens = "non-pad tokens, rounded up to whole global batches (default: the run's train.eval_tokens)"
    tool.add_argument("--tokens", type=_count, help=tokens)
    tool.add_argument("--json", action="store_true", help="print one line of JSON (default: a table)")


if __name__ == "__main__":
    sys.exit(main())
