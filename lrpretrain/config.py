"""The configuration of a run: dataclasses, how they are read, and what is checked before anything starts.

Precedence: defaults < file < command line. Everything that is wrong is reported at once.
The dataclasses import nothing; jsonargparse is an implementation detail of this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelConfig:
    """Which network."""

    config: str = "llama_toy"
    """A shipped model config (llama_60m) or the path of a Hugging Face config.json."""


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

    rule: Literal["adamw", "galore"] = "galore"
    """The update rule of the matched matrices; everything else is trained with AdamW."""
    lr: float = 0.01
    """Peak learning rate."""
    lr_regular: float | None = None
    """Peak learning rate of the parameters that are not projected. Default: optim.lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment (not bias-corrected: the Hugging Face form of AdamW)."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate."""
    rank: int = 128
    """Rank of the projection."""
    attn_rank: int | None = None
    """Rank in the attention. Default: optim.rank."""
    mlp_rank: int | None = None
    """Rank in the MLP. Default: optim.rank."""
    scale: float = 0.25
    """GaLore: factor of the projected update (the authors' galore_scale)."""
    refresh_every: int = 200
    """GaLore: steps between two refreshes of the basis (the authors' update_proj_gap)."""
    side: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    """GaLore: which side is projected; std is the shorter one."""
    subspace: Literal["svd", "gram", "warm"] = "warm"
    """How the basis is found: svd (exact, gathers the matrix), gram (eigenvectors of the smaller Gram
    matrix), warm (one subspace iteration from the previous basis)."""
    targets: list[str] = field(default_factory=lambda: ["*.self_attn.*_proj", "*.mlp.*_proj"])
    """Names of the linear layers that the rule applies to, with * as wildcard."""


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
    schedule: Literal["linear", "cosine", "wsd", "cosine_restart"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 1000
    """Steps of linear warm-up from 0."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, as a ratio of the peak."""
    decay_steps: int | None = None
    """wsd: steps of the decay at the end. Default: a fifth of train.steps."""
    restart_every: int | None = None
    """cosine_restart: steps between two restarts."""
    restart_warmup_steps: int = 5
    """cosine_restart: steps of the ramp after a restart."""
    clip_norm: float | None = None
    """Largest norm of the raw gradient (default: no clipping)."""
    prompt: str | None = None
    """A line that the model continues at each evaluation."""


@dataclass
class EngineConfig:
    """How the network is spread over processes."""

    kind: Literal["local", "ddp", "fsdp"] = "local"
    """local: one process; ddp: whole copies; fsdp: FSDP2, sharded parameters."""
    accumulate_unsharded: bool = False
    """fsdp: keep whole gradients over the micro-batches of a step and communicate once."""
    timeout_s: float = 1800.0
    """Seconds after which a collective that does not end takes the job down."""


@dataclass
class PrecisionConfig:
    """Which floats."""

    params: Literal["float32", "bfloat16"] = "float32"
    """The weights that the optimizer updates."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Forward and backward; bfloat16 over float32 weights needs engine.kind=fsdp."""


@dataclass
class RunConfig:
    """Where it is written and where it goes on."""

    dir: str = "runs/default"
    """The run folder."""
    resume: str = "auto"
    """auto: from the newest complete checkpoint of run.dir, if any; never; or a checkpoint's path."""


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
