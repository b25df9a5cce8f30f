"""The configuration of a run: dataclasses, how they are read, and what is checked before anything starts.

Precedence: defaults < file < command line. Everything that is wrong is reported at once.
jsonargparse, which knows the types, is an implementation detail of this file.
"""

from __future__ import annotations

import difflib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lrpretrain.errors import ConfigError, Problem


@dataclass
class ModelConfig:
    """Which network."""

    config: str = "llama_60m"
    """A shipped model config (llama_60m) or the path of a Hugging Face config.json."""
    init_from: str | None = None
    """A Hugging Face folder with model*.safetensors of that model, to start from. Default: random weights."""
    checkpointing: Literal["none", "full", "selective"] = "none"
    """What backward computes again instead of keeping it: full: all inside a decoder block; selective: all
    but matmuls and attention."""
    checkpoint_every: int = 1
    """full, selective: decoder blocks from one that does so to the next. 1: all do."""
    loss_chunk: int = 4096
    """Tokens of a micro-batch whose logits exist at a time. 0: all."""


@dataclass
class DataConfig:
    """Which text, and how it becomes sequences."""

    source: Literal["sample", "files", "hub", "tokens"] = "sample"
    """sample: the embedded corpus; files: C4-format .json.gz shards; hub: shards of a Hugging Face
    data set; tokens: shards written by `lrpretrain tokenize`."""
    path: str | None = None
    """files: a folder or glob of training shards; tokens: the folder; hub: the data set (allenai/c4)."""
    validation_path: str | None = None
    """files and tokens: the validation shards; by default what is named *validation* in data.path."""
    subset: str = "en"
    """hub: the folder of the data set that holds the shards."""
    sequences: Literal["pad", "pack"] = "pad"
    """pad: one document a row, cut or padded (the papers' protocol); pack: documents end to end."""
    seq_len: int = 256
    """Tokens in a row."""
    document_mask: bool = False
    """pack: keep attention within a document (default: it crosses documents)."""
    tokenizer: str | None = None
    """A sentencepiece .model file, or a tokenizer of the hub (t5-base). Default: for the source
    `sample` its own, with 4000 ids."""
    lanes: int = 64
    """Parallel readers that the documents are dealt to: part of the run's identity, independent of the
    number of processes."""
    epochs: int | None = None
    """Passes over the data. Default: 1 for the hub, unlimited otherwise."""
    prefetch: int = 2
    """Global batches that are read ahead of the step."""
    workers: int = 4
    """Threads in each process that read and tokenize; also the most downloads at a time."""
    cache_dir: str | None = None
    """Where corpora and downloads are kept. Default: $LRPRETRAIN_CACHE, or ~/.cache/lrpretrain."""
    hub_patience_s: float = 600.0
    """Seconds that a failing download is tried again before the run gives up."""


@dataclass
class OptimConfig:
    """Which optimizer."""

    rule: Literal["adamw", "galore", "gradnormlorp", "loro", "factored", "sgd", "adafactor"] = "galore"
    """The update rule of the matched matrices; everything else is trained with AdamW. For comparison:
    factored (low-rank weights as for loro, under plain AdamW); sgd and adafactor (one process or ddp), which
    train everything."""
    base: Literal["adamw", "adafactor"] = "adamw"
    """galore, gradnormlorp: what runs in the subspace, and on all other parameters. adafactor (one process or
    ddp) keeps the second moment as a row and a column; optim.betas and optim.eps are those of adamw."""
    lr: float = 0.01
    """Peak learning rate."""
    lr_regular: float | None = None
    """Peak learning rate of the parameters that are not projected. Default: optim.lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    momentum: float = 0.0
    """sgd, adafactor: decay of the first moment. 0: none is kept."""
    eps: float = 1e-6
    """Added to the root of the second moment (not bias-corrected: the Hugging Face form of AdamW)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate."""
    rank: int = 128
    """Rank of the projection, or of the low-rank weights (loro)."""
    attn_rank: int | None = None
    """Rank in the attention. Default: optim.rank."""
    mlp_rank: int | None = None
    """Rank in the MLP. Default: optim.rank."""
    mode: Literal["weightnorm", "lowrank_wn", "dora"] = "weightnorm"
    """gradnormlorp: weightnorm (learned magnitudes that persist), lowrank_wn (the authors' optimizer, which
    overwrites magnitudes at each step and keeps a copy of all weights; one process or ddp) or dora (the
    paper's W = M (W0 + BA) / ‖W0 + BA‖, with W0 and all other layers frozen as model.init_from has them)."""
    adapter_rank: int = 8
    """dora: rank of B and A. Their gradients are projected to optim.rank."""
    adapter_alpha: float = 16.0
    """dora: BA counts adapter_alpha / adapter_rank times."""
    scale: float = 0.25
    """galore, gradnormlorp: factor of the projected update (the authors' galore_scale)."""
    refresh_every: int = 200
    """galore, gradnormlorp: steps between two refreshes of the basis (the authors' update_proj_gap)."""
    side: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """galore, gradnormlorp: which side is projected; std is the shorter one."""
    subspace: Literal["svd", "gram", "warm", "randomized", "random"] = "warm"
    """How the basis is found: svd (exact, gathers the gradient), gram (eigenvectors of the Gram matrix), warm
    (one subspace iteration from the previous basis), randomized (two from a random start), random."""
    refresh: Literal["fixed", "staggered"] = "fixed"
    """When bases are refreshed (loro: when pairs take their exact steps): all in the same step, or spread
    over the gap."""
    placement: Literal["auto", "aligned", "owner", "seeded"] = "auto"
    """galore, gradnormlorp: where a sharded matrix is updated: aligned, where its shards are, with a basis on
    each process; owner, whole on one process, which keeps its state; seeded, as aligned with random bases
    drawn anew in every step. auto: by shapes and the number of processes, as printed at start."""
    moments_at_refresh: Literal["keep", "reset", "rotate"] = "keep"
    """What becomes of the moments at a refresh."""
    moments: Literal["float32", "bfloat16", "int8"] | None = None
    """What the moments are stored in. Default: the dtype of the parameter. int8, block by
    block, is for projected gradients (galore, gradnormlorp), where the moments of other parameters then have
    the parameter's dtype, and for all matrices with adamw (one process or ddp)."""
    basis: Literal["float32", "bfloat16"] | None = None
    """galore, gradnormlorp: what the bases are stored in. Default: the dtype of the parameter."""
    exact_every: int = 500
    """loro: updates between two exact steps. 0: none."""
    refresh_moments: Literal["all", "lrk", "reg", "none"] = "all"
    """loro: whose moments are zeroed after an exact step: all, the factors', the others', none."""
    refresh_moments_every: int | None = None
    """loro, factored: updates after which they are zeroed, instead of exact steps."""
    lr_scaler: float = -1.0
    """loro: factor of the learning rate in lazy steps; -1: rank / hidden size."""
    init: str = "xavier"
    """loro, factored: initial factors: xavier, auto, kaiming, orth, xavorth, randn_<std> or const_<value>."""
    targets: list[str] = field(default_factory=lambda: ["*.self_attn.*_proj", "*.mlp.*_proj"])
    """Names of the linear layers that the rule applies to, with * as wildcard."""
    per_layer: bool = False
    """Update every decoder block in the backward, once its gradients are complete, and drop them: with one
    micro-batch a step, those of one block exist at a time (local, fsdp; not loro). train.clip_norm then clips
    by the norm of the step before, and a gradient that is not finite leaves out its own block only."""


@dataclass
class TrainConfig:
    """How long, how large, how fast."""

    steps: int = 10_000
    """Optimizer steps."""
    seed: int = 0
    """Seed of the initial weights, the data order and every random choice."""
    micro_batch: int = 16
    """Sequences that one process takes through the network at a time."""
    global_batch: int = 512
    """Sequences in an optimizer step, over all processes and micro-batches."""
    log_every: int = 10
    """Steps between two log lines."""
    eval_every: int = 1000
    """Steps between two evaluations; there is one at step 0 and one at the end as well. 0: none."""
    eval_tokens: int = 10_000_000
    """Non-pad tokens in an evaluation."""
    save_every: int = 1000
    """Steps between two checkpoints; there is one at the end as well. 0: only that one."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept. 0: all."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps, a multiple of train.save_every, are never removed.
    0: none."""
    async_save: bool = True
    """Wait only for a copy of the state to host memory, which is kept for the next save, and write the files
    beside the training."""
    schedule: Literal["linear", "cosine", "wsd", "cosine_restart", "cosine_restart_zero"] = "cosine"
    """Shape of the learning rate after the warm-up; cosine_restart is for loro: a ramp after each refresh."""
    warmup_steps: int = 1000
    """Steps of linear warm-up from 0; for cosine_restart from train.min_lr_ratio."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a ratio of the peak."""
    decay_steps: int | None = None
    """wsd: steps of the decay at the end. Default: a fifth of train.steps."""
    restart_every: int | None = None
    """cosine_restart and _zero: steps between two ramps; for loro those between two refreshes of moments."""
    restart_warmup_steps: int = 5
    """cosine_restart and _zero: steps of a ramp, from 1e-6 of the peak; for _zero from a tenth of its end."""
    restart_at: Literal["refresh", "compat"] = "refresh"
    """cosine_restart and _zero: refresh: a ramp follows every train.restart_every-th step; compat: LORO's
    script, which counts from step train.peak_delay_steps once the warm-up is over: refreshes between have no
    ramp."""
    restart_in_warmup: bool = True
    """cosine_restart and _zero: whether there are ramps in the warm-up (false: lr_jag_after_warmup)."""
    peak_delay_steps: int = 0
    """cosine_restart and _zero: steps from the end of the warm-up to the peak. The cosine is drawn so much
    later, and ends that much early (LORO's lr_adjust_steps, which is negative)."""
    clip_norm: float | None = None
    """Largest norm of the raw gradient (default: no clipping)."""
    unsound: Literal["stop", "skip"] = "stop"
    """What is done about a step whose loss or gradient is not finite, or whose loss is a spike. It changes
    nothing in either case: stop ends the run with a checkpoint after it, skip goes on with the next batch."""
    max_skipped: int = 10
    """skip: how many steps in a row may be so before the run stops all the same."""
    spike_sigmas: float = 10.0
    """How many standard deviations a loss lies above the mean of the last ones to be a spike; a deviation
    counts as at least 3 % of the mean. 0: no loss is."""
    spike_window: int = 100
    """Over how many losses mean and deviation are taken; before there are as many, no loss is a spike."""
    prompt: str | None = None
    """A line that the model continues at each evaluation."""
    profile_steps: int = 0
    """Steps that torch.profiler records on the first process, for run.dir/profile. 0: none."""
    profile_from: int = 10
    """Steps after the start, or after a resume, before the recorded ones."""


@dataclass
class EngineConfig:
    """How the network is spread over processes."""

    kind: Literal["local", "ddp", "fsdp", "zero"] = "local"
    """local: one process; ddp: whole copies; fsdp: FSDP2, sharded parameters; zero: DeepSpeed ZeRO."""
    ds_config: str | None = None
    """zero: DeepSpeed's settings: a shipped file (zero1, zero2, zero3) or a path. Default: zero2."""
    replicas: int = 1
    """fsdp: groups of processes that each hold the whole model in shards (HSDP)."""
    shard_columns: bool = True
    """fsdp: cut matrices that are projected on the left along their columns, where these divide evenly over
    the processes: the optimizer then communicates nothing for them."""
    accumulate_unsharded: bool = False
    """fsdp: keep whole gradients over the micro-batches of a step and communicate once."""
    reshard_after_forward: bool = True
    """fsdp: drop the gathered weights of a decoder block after its forward, and gather them again for its
    backward: less memory, more communication."""
    prefetch_blocks: int = 0
    """fsdp: decoder blocks that are gathered ahead of the one that runs. 0: as FSDP2 does by itself."""
    compile: bool = False
    """Compile the decoder blocks with torch.compile; it takes a C++ compiler."""
    timeout_s: float = 1800.0
    """Seconds after which a collective that does not end takes the job down."""


@dataclass
class PrecisionConfig:
    """Which floats."""

    params: Literal["float32", "bfloat16"] = "float32"
    """The weights that the optimizer updates."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Forward and backward; bfloat16 over float32 weights needs engine.kind=fsdp or zero."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """fsdp: what gradients are added up in over the processes. bfloat16, with bfloat16 arithmetic, sends half
    as much and loses digits, the more the more processes there are."""


@dataclass
class RunConfig:
    """Where it is written and where it goes on."""

    dir: str = "runs/default"
    """The run folder."""
    resume: str = "auto"
    """auto: from the newest intact checkpoint of run.dir, if any; never; or the path of a checkpoint, such as
    one of another run, from which this one starts; it goes on from its own once it has any."""
    time_limit_s: float | None = None
    """Seconds after the start of the process (or of its torchrun) by which the run has stopped with a
    checkpoint, exit code 75. For that it leaves twice the time of the longest step and of the last save; or,
    before the first save, 5 minutes, but at most a tenth of the limit."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class ClassifierConfig:
    """Which network is fine-tuned, and what of it."""

    init_from: str | None = None
    """Pretrained BERT, RoBERTa or LLaMA: a Hugging Face folder, or a name of the hub (roberta-base)."""
    adapter: Literal["none", "lora", "dora"] = "none"
    """lora, dora: PEFT's adapters of optim.adapter_rank, under AdamW, beside frozen weights."""
    dropout: float | None = None
    """Dropout of hidden states, attention and head. Default: the pretrained model's. Each process draws its
    own: with 0 losses do not depend on their number."""


@dataclass
class GlueConfig:
    """Which task, and where its rows are."""

    task: Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"] = "mrpc"
    """A task of GLUE."""
    path: str | None = None
    """Rows with the task's fields and `label`: a .jsonl, .csv or .parquet file of training rows, or a folder
    of train.*, validation.* (mnli: validation_matched.*, validation_mismatched.*). Default: the hub's."""
    validation_path: str | None = None
    """The file of validation rows (mnli: the matched ones), where data.path is a file."""
    mismatched_path: str | None = None
    """mnli: the file of mismatched validation rows, where data.path is a file. Default: none."""
    seq_len: int = 128
    """Tokens of a row, or of a pair of them, at most: the rest is cut off."""


@dataclass
class FinetuneOptimConfig(OptimConfig):
    """Which optimizer: as for pretraining, but for defaults, and adapters where the rule is loro."""

    rule: Literal["adamw", "galore", "gradnormlorp", "loro"] = "adamw"
    """adamw: full fine-tuning, or model.adapter; loro: low-rank adapters beside frozen weights."""
    lr: float = 3e-5
    """Peak learning rate."""
    rank: int = 8
    """Rank of the projection, or of LORO's adapters."""
    adapter_rank: int = 8
    """model.adapter, gradnormlorp with optim.mode=dora: rank of B and A."""
    adapter_alpha: float = 16.0
    """model.adapter, optim.mode=dora, loro: BA counts adapter_alpha times, over its rank."""
    scale: float = 4.0
    """galore, gradnormlorp: factor of the projected update (the authors' galore_scale)."""
    refresh_every: int = 500
    """galore, gradnormlorp: steps between two refreshes of the basis (the authors' update_proj_gap)."""
    exact_every: int = 100
    """loro: updates between two exact steps. 0: none."""
    refresh_moments: Literal["all", "lrk", "reg", "none"] = "none"
    """loro: whose moments are zeroed after an exact step: all, the factors', the others', none."""
    lr_scaler: float = 1.0
    """loro: factor of the learning rate in lazy steps; -1: rank / larger side of the factor."""
    init: str = "xavier"
    """loro: initial factors, as for pretraining, or by the weight's singular vectors: spec_top, spec_low (the
    first, the last) or eig_low (the last, times √σ). Their product is taken off the weight, so that
    the network starts as it was."""
    compat: bool = False
    """loro: as the authors' script: biases of adapted layers become zero, and the head stays as drawn. Else
    biases are kept, and new layers, such as the head, are trained beside the adapters."""
    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that the rule or the adapters apply to, with * as wildcard. Default: all of
    the network's blocks."""


@dataclass
class FinetuneTrainConfig:
    """How long, how large, how fast."""

    epochs: int = 3
    """Passes over the training rows; the validation rows are evaluated after each."""
    steps: int | None = None
    """Optimizer steps at most."""
    seed: int = 0
    """Seed of the head, the order of rows, dropout and every random choice."""
    runs: int = 1
    """Runs, with the seeds train.seed, train.seed + 1, …; results.json has their mean and spread."""
    micro_batch: int = 16
    """Rows that one process takes through the network at a time."""
    global_batch: int = 16
    """Rows in an optimizer step, over all processes and micro-batches."""
    log_every: int = 50
    """Steps between two log lines."""
    save_every: int = 0
    """Steps between two checkpoints; there is one at the end of a run as well. 0: an epoch."""
    schedule: Literal["linear", "cosine", "wsd"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a ratio of the peak."""
    clip_norm: float | None = None
    """Largest norm of the raw gradient (default: no clipping)."""
    unsound: Literal["stop", "skip"] = "stop"
    """What is done about a step whose loss or gradient is not finite: stop ends the run, skip goes on with
    the next batch. It changes nothing in either case."""


@dataclass
class FinetuneConfig:
    """A fine-tuning on a task of GLUE."""

    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: GlueConfig = field(default_factory=GlueConfig)
    optim: FinetuneOptimConfig = field(default_factory=FinetuneOptimConfig)
    train: FinetuneTrainConfig = field(default_factory=FinetuneTrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def of_run(self, run: int, epoch: int) -> Config:
        """Return one of the runs as engines and the training loop take it; `epoch` is its steps."""
        train = self.train
        steps = min(train.epochs * epoch, train.steps or train.epochs * epoch)
        own = {k: v for k, v in vars(train).items() if k not in ("epochs", "runs")}
        own |= {"steps": steps, "seed": train.seed + run, "eval_every": epoch, "spike_sigmas": 0.0}
        own |= {"save_every": train.save_every or epoch, "keep_checkpoints": 1}
        folder = replace(self.run, dir=str(Path(self.run.dir) / f"seed_{train.seed + run}"))
        train_config = TrainConfig(**own)
        return Config(
            ModelConfig(init_from=self.model.init_from),
            optim=self.optim,
            train=train_config,
            engine=self.engine,
            precision=self.precision,
            run=folder,
        )


_SHIPPED = {
    "model_configs": ("model_configs", ".json"),
    "recipes": ("launch/recipes", ".yaml"),
    "ds_configs": ("ds_configs", ".json"),
}


def find_shipped(kind: str, name: str) -> Path | None:
    """Return the path of a file: `name` itself if it is one, else the shipped one of that name, else None.

    `kind` is model_configs, recipes or ds_configs. They lie in the wheel, or in the checkout of an editable
    install.
    """
    if Path(name).is_file():
        return Path(name)
    folder, suffix = _SHIPPED[kind]
    here = Path(__file__).parent
    for root in (here / "shipped" / kind, here.parent / folder):
        path = root / (name if name.endswith(suffix) else name + suffix)
        if path.is_file():
            return path
    return None


def shipped_names(kind: str) -> list[str]:
    """Return the names of the shipped files of a kind."""
    folder, suffix = _SHIPPED[kind]
    here = Path(__file__).parent
    return sorted(
        {p.stem for root in (here / "shipped" / kind, here.parent / folder) for p in root.glob(f"*{suffix}")}
    )


C = TypeVar("C", Config, FinetuneConfig)


def parse(
    argv: Sequence[str],
    prog: str = "lrpretrain.pretrain",
    onto: C | None = None,
    kind: type[C] = Config,  # type: ignore[assignment]
) -> tuple[C, list[Problem | str]]:
    """Read a configuration from a command line, and return it with everything that is wrong with it.

    What is not given there is as in `onto`, or the default of its `kind`.

    Items that cannot be read keep their default, so that the rest can be checked as well. `--help` and
    `--print_config` print and exit.
    """
    parser = _parser(prog, kind)
    if any(a in ("-h", "--help") for a in argv):
        parser.parse_args(["--help"])
    problems: list[Problem | str] = []
    values: dict[str, dict[str, Any]] = {} if onto is None else asdict(onto)
    known = _keys(kind)
    other, entry = (FinetuneConfig, "finetune") if kind is Config else (Config, "pretrain")
    for key, value, origin in _items(argv, problems):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"Perhaps {near[0]} is meant" if near else "`--help` lists the fields"
            if key in _keys(other):
                remedy = f"It is one of `python -m lrpretrain.{entry}`"
            problems.append(Problem(key, value, f"unknown key in {origin}", remedy))
            continue
        section, name = key.split(".")
        try:
            if origin == "the command line":
                read = parser.parse_args([f"--{key}={value}"])
            else:
                read = parser.parse_object({section: {name: value}})
        except Exception as error:  # jsonargparse raises many kinds
            problems.append(Problem(key, value, f"{_reason(error)} ({origin})", "Give a value of that type"))
        else:
            values.setdefault(section, {})[name] = read[key]
    config = from_dict(values, parser, kind)
    if any(a.startswith("--print_config") for a in argv):
        if problems:
            raise ConfigError(problems)
        print(to_yaml(config))
        raise SystemExit(0)
    return config, problems


def _reason(error: Exception) -> str:
    """Return jsonargparse's last word without the value and Python's way of writing types."""
    text = str(error).splitlines()[-1].split(" Got value")[0].strip().rstrip(".")
    text = re.sub(r"<class '(\w+)'>|typing\.", lambda m: m[1] or "", text)
    return re.sub(r"^Expected an? ", "expected ", text)


def from_dict(
    values: dict[str, dict[str, Any]],
    parser: Any = None,
    kind: type[C] = Config,  # type: ignore[assignment]
) -> C:
    """Return the configuration of a tree of values, with defaults for what is absent. Raises ConfigError."""
    parser = parser or _parser("lrpretrain", kind)
    try:
        tree = parser.instantiate(parser.parse_object(values))
    except Exception as error:  # jsonargparse raises many kinds
        message = f"the configuration cannot be read: {_reason(error)}. Use the version that wrote it."
        raise ConfigError([message]) from error
    return kind(**{section.name: tree[section.name] for section in fields(kind)})


def to_yaml(config: Config | FinetuneConfig) -> str:
    """Return the configuration as a commented YAML file that `--config` accepts."""
    parser = _parser("lrpretrain", type(config))
    values = {s.name: dict(vars(getattr(config, s.name))) for s in fields(config)}
    text: str = parser.dump(parser.parse_object(values), skip_unset=False, with_comments=True)
    return text


def flat(config: Config | FinetuneConfig) -> dict[str, Any]:
    """Return the fields by section.name, of plain values as in a file: lists for tuples."""
    sections: dict[str, dict[str, Any]] = json.loads(json.dumps(asdict(config)))
    return {f"{section}.{name}": value for section, own in sections.items() for name, value in own.items()}


def _keys(kind: type[Config] | type[FinetuneConfig]) -> set[str]:
    return {f"{s.name}.{f.name}" for s in fields(kind) for f in fields(_section(s))}


def _section(section: Field[Any]) -> type[Any]:
    """Return the dataclass of a section."""
    assert isinstance(section.default_factory, type)
    return section.default_factory


def _build_parser(prog: str, kind: type[Config] | type[FinetuneConfig]) -> Any:
    import jsonargparse

    logging.getLogger("jsonargparse").setLevel(logging.ERROR)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config", help="A recipe's name or a YAML file of these fields.")
    for section in fields(kind):
        parser.add_class_arguments(_section(section), section.name)
    return parser


# It reads the source of the fields' docstrings, once a process.
_parser: Callable[..., Any] = functools.cache(_build_parser)


def _items(argv: Sequence[str], problems: list[Problem | str]) -> Iterator[tuple[str, Any, str]]:
    """Yield (key, value, origin) of every setting: first of the files, then of the command line."""
    settings: list[tuple[str, str]] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument.startswith("--print_config"):
            continue
        if not argument.startswith("--"):
            problems.append(f"{argument!r} is not an option. Options are --section.field VALUE")
            continue
        key, equals, value = argument[2:].partition("=")
        following = value if equals else next(arguments, None)
        if following is None:
            problems.append(Problem(key, None, "has no value", f"Write --{key} VALUE"))
        elif key not in ("local_rank", "local-rank"):  # launchers add it
            settings.append((key, following))
    for key, value in settings:
        if key == "config":
            yield from _file_items(value, problems)
    for key, value in settings:
        if key != "config":
            yield key, value, "the command line"


def _file_items(name: str, problems: list[Problem | str]) -> Iterator[tuple[str, Any, str]]:
    path = find_shipped("recipes", name)
    if path is None:
        remedy = f"Give a YAML file or one of {', '.join(shipped_names('recipes'))}"
        problems.append(Problem("config", name, "is neither a file nor a recipe", remedy))
        return
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(Problem("config", name, f"cannot be read: {error}", "Mend the file"))
        return
    if not isinstance(tree or {}, dict):
        problems.append(
            Problem("config", name, "is not a mapping of sections", "Write `section:` and fields below it")
        )
        return
    for section, entries in (tree or {}).items():
        if not isinstance(entries, dict):
            problems.append(
                Problem(
                    str(section),
                    entries,
                    f"is not a section of fields in {path}",
                    "Indent the fields below it",
                )
            )
            continue
        for key, value in entries.items():
            yield f"{section}.{key}", value, str(path)
