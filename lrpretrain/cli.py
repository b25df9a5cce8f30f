"""The tools beside training: `lrpretrain show | tokenizer train | tokenize | download | generate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lrpretrain import __version__
from lrpretrain.errors import CheckpointError, ConfigError, LrpretrainError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one tool; return its exit code."""
    parser = _parser()
    known, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest and known.run is not show:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    known.overrides = rest
    try:
        known.run(known)
    except LrpretrainError as error:
        print(f"lrpretrain: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def show(args: argparse.Namespace) -> None:
    """Print a configuration's resolved values and what they amount to."""
    from lrpretrain import config
    from lrpretrain.train import plan

    read, problems = config.parse(["--config", args.file, *args.overrides], prog="lrpretrain show FILE")
    problems += plan.problems(read, args.procs)
    if problems:
        raise ConfigError(problems)
    print(config.to_yaml(read))
    print(plan.describe(read, args.procs))


def train_tokenizer(args: argparse.Namespace) -> None:
    """Train a sentencepiece tokenizer on the documents of C4-format shards or of the embedded corpus."""
    from lrpretrain.data import tokenizer

    source = _text_source(args)
    texts = (document for shard in range(len(source.names)) for document in source.read(shard))
    tokenizer.train(texts, args.out, args.vocab_size, max_chars=args.max_chars)
    print(f"wrote {args.out}: {args.vocab_size} ids")


def tokenize(args: argparse.Namespace) -> None:
    """Write pre-tokenised shards."""
    from lrpretrain.data import tokenizer, tokens

    source = _text_source(args)
    ids = tokenizer.load(str(args.tokenizer), args.vocab_size)
    tokens.tokenize(source, source.names, ids, args.out, args.split)
    print(f"wrote {len(source.names)} shards of {args.split} to {args.out}")


def download(args: argparse.Namespace) -> None:
    """Fetch shards of a data set of the hub into a folder; run again, it goes on."""
    from lrpretrain.data import hub

    first, _, last = args.shards.partition(":")
    if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise ConfigError([f"--shards {args.shards!r} is not a range. Write FIRST:END, such as 0:64."])
    hub.download(args.dataset, args.subset, range(int(first), int(last)), args.folder, patience_s=args.patience_s)
    print(f"{args.folder} is complete; train with --data.source files --data.path {args.folder}")


def generate(args: argparse.Namespace) -> None:
    """Continue a prompt with the model of a checkpoint."""
    import torch

    from lrpretrain import config
    from lrpretrain.artifacts import checkpoint
    from lrpretrain.data.vocabulary import configured
    from lrpretrain.model import llama
    from lrpretrain.sharding import hold
    from lrpretrain.sharding.procs import Procs

    path = args.checkpoint
    if not (path / "manifest.json").is_file():
        found = checkpoint.complete(path / "checkpoints")
        if not found:
            raise CheckpointError(f"{path} is neither a checkpoint nor a run folder with a complete one.")
        path = found[0]
    run = config.from_dict(checkpoint.read_run(path)["config"])
    if args.tokenizer:
        run.data.tokenizer = args.tokenizer
    model = llama.build(llama.load_config(run.model))
    ids = configured(run, model.config.vocab_size)
    llama.materialize(model, torch.device("cpu"))
    holdings = [hold(name, param) for name, param in model.named_parameters()]
    checkpoint.load(path, {f"model/{h.name}": h.piece for h in holdings}, Procs())
    torch.manual_seed(args.seed)
    prompt = torch.from_numpy(ids.encode(args.prompt)[None, :-1])  # without the eos
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    written = model.eval().generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=args.tokens,
        eos_token_id=ids.eos_id,
        pad_token_id=ids.pad_id,
        use_cache=True,
        **sampling,
    )
    print(ids.decode(written[0].tolist()))


def _text_source(args: argparse.Namespace):  # type: ignore[no-untyped-def]
    from lrpretrain.config import DataConfig
    from lrpretrain.data.sources import open_source

    data = DataConfig(source="files" if args.path else "sample", path=args.path)
    return open_source(data, getattr(args, "split", "train"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrpretrain", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    tools = parser.add_subparsers(required=True, metavar="TOOL")

    tool = tools.add_parser("show", help="resolved values of a configuration, and their arithmetic")
    tool.add_argument("file", help="a recipe's name or a YAML file; --section.field VALUE may follow")
    tool.add_argument("--procs", type=int, default=1, help="processes that the run will have (1)")
    tool.set_defaults(run=show)

    group = tools.add_parser("tokenizer", help="make a tokenizer").add_subparsers(required=True, metavar="ACTION")
    tool = group.add_parser("train", help="train a sentencepiece BPE model (pad 0, eos 1, unk 2)")
    tool.add_argument("out", type=Path, help="the .model file to write")
    tool.add_argument("--path", help="folder or glob of C4-format shards (default: the embedded corpus)")
    tool.add_argument("--vocab_size", type=int, default=32000, help="number of ids (32000)")
    tool.add_argument("--max_chars", type=int, default=50_000_000, help="characters to learn from (50,000,000)")
    tool.set_defaults(run=train_tokenizer)

    tool = tools.add_parser("tokenize", help="write pre-tokenised shards for data.source=tokens")
    tool.add_argument("out", type=Path, help="the folder to write")
    tool.add_argument("--tokenizer", type=Path, required=True, help="a .model file or a tokenizer of the hub")
    tool.add_argument("--path", help="folder or glob of C4-format shards (default: the embedded corpus)")
    tool.add_argument("--split", choices=["train", "validation"], default="train")
    tool.add_argument("--vocab_size", type=int, default=32000, help="the model's vocabulary (32000)")
    tool.set_defaults(run=tokenize)

    tool = tools.add_parser("download", help="fetch C4 shards, for clusters without internet")
    tool.add_argument("folder", type=Path)
    tool.add_argument("--shards", default="0:64", help="training shards FIRST:END (0:64)")
    tool.add_argument("--dataset", default="allenai/c4")
    tool.add_argument("--subset", default="en")
    tool.add_argument("--patience_s", type=float, default=600.0, help="seconds of trying again (600)")
    tool.set_defaults(run=download)

    tool = tools.add_parser("generate", help="continue a prompt")
    tool.add_argument("checkpoint", type=Path, help="a checkpoint, or a run folder for its newest one")
    tool.add_argument("prompt")
    tool.add_argument("--tokens", type=int, default=64, help="at most so many new tokens (64)")
    tool.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (0)")
    tool.add_argument("--seed", type=int, default=0)
    tool.add_argument("--tokenizer", help="instead of the run's own")
    tool.set_defaults(run=generate)
    return parser


if __name__ == "__main__":
    sys.exit(main())
