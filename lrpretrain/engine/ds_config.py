"""DeepSpeed's settings: which keys of its file are honoured, and what is added to them.

The list is explicit, because DeepSpeed ignores a misspelt key at the top, and obeys many a key that takes
weights, gradients or steps out of the optimizer's reach. A key is one of three things:

- *the recipe's*: batch sizes, clipping and precision follow from the configuration. A file may leave them
  out, say "auto", or agree. (Left to itself, DeepSpeed 0.19 clips at 1.0.)
- *the file's*: stage, buckets, overlap: what moves data and not results. Keys of another stage do nothing.
- *refused*, with the reason. What is refused but off (false, null, "enabled": false, "device": "none") is
  passed over.

Where the file is silent, gradients are added up in float32, over micro-batches and processes, as under FSDP2.
DeepSpeed's own default is the compute dtype, and then the losses of a bfloat16 run depend on the stage and on
the number of processes. The price: `communication_data_type` doubles the bytes of a bfloat16 reduction;
`data_types.grad_accum_dtype` adds 2 bytes for each number of a shard at stages 2 and 3, and selects
BF16_Optimizer at stage 1, where every process keeps a float32 gradient of all parameters. A file may say
"bf16" for both. DeepSpeed's throughput timer is turned off: it waits for the device twice a micro-batch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from lrpretrain.config import Config, find_shipped, shipped_names
from lrpretrain.errors import ConfigError, Problem


class _Values(NamedTuple):
    """The values that a key can have."""

    words: str
    fit: Callable[[Any], bool]


def _whole(least: int, multiple: int = 1) -> Callable[[Any], bool]:
    """Accept whole numbers, 5e8 too; True is none, though pydantic would take it for 1."""

    def fits(v: Any) -> bool:
        whole = type(v) is int or (type(v) is float and v.is_integer())
        return whole and v >= least and v % multiple == 0

    return fits


def _only(value: Any, because: str) -> _Values:
    """Accept nothing but DeepSpeed's default: files spell it out."""
    words = f"{json.dumps(value)} ({because})"
    return _Values(words, lambda v: v == value and isinstance(v, bool) == isinstance(value, bool))


_FLAG = _Values("true or false", lambda v: isinstance(v, bool))
_SIZE = _Values("a whole number, at least 1", _whole(1))
_BOUND = _Values("a whole number, at least 0", _whole(0))
_EVEN = _Values("an even whole number, at least 2", _whole(2, 2))
_DTYPE = _Values('"fp32" or "bf16"', lambda v: v in ("fp32", "bf16"))


def _keys(text: str) -> list[str]:
    """Split a line of the tables below; a leading dot stands for zero_optimization."""
    return [f"zero_optimization{key}" if key.startswith(".") else key for key in text.split()]


_STAGE = "zero_optimization.stage"
HONOURED = {
    key: values
    for values, keys in [
        (
            _Values("1, 2 or 3 (stage 0 is engine.kind=ddp)", lambda v: type(v) is int and 1 <= v <= 3),
            ".stage",
        ),
        (_DTYPE, "communication_data_type data_types.grad_accum_dtype"),
        (_FLAG, "bf16.immediate_grad_update wall_clock_breakdown memory_breakdown dump_state"),
        (_FLAG, "timers.throughput.enabled timers.throughput.synchronized"),
        (_FLAG, "comms_logger.enabled comms_logger.verbose comms_logger.prof_all comms_logger.debug"),
        (_FLAG, ".contiguous_gradients .overlap_comm .reduce_scatter .round_robin_gradients"),
        (_FLAG, ".use_multi_rank_bucket_allreduce .ignore_unused_parameters .memory_efficient_linear"),
        (_FLAG, ".stage3_use_all_reduce_for_fetch_params .stage3_allgather_sequential"),
        (_FLAG, ".stage3_gather_16bit_weights_on_model_save .log_trace_cache_warnings .enable_sanity_checks"),
        (_SIZE, "steps_per_print .reduce_bucket_size .sub_group_size"),
        (_EVEN, ".allgather_bucket_size"),
        (_BOUND, ".stage3_max_live_parameters .stage3_max_reuse_distance .stage3_prefetch_bucket_size"),
        (_BOUND, ".stage3_param_persistence_threshold .stage3_model_persistence_threshold"),
        (_only(True, "a step whose gradient is not finite must be skipped"), "bf16.check_grad_overflow"),
        (_only(False, "gradients are averaged after they are added up"), "prescale_gradients"),
        (_only(1, "gradients are averaged after they are added up"), "gradient_predivide_factor"),
        (_only("mean", "the loss is scaled for an average"), "gradient_allreduce_op"),
        (_only(True, "DeepSpeed counts the micro-batches of a step"), "managed_gradient_accumulation"),
        (_only(True, "false does nothing in this DeepSpeed"), ".allgather_partitions"),
        (_only(True, "the norm is logged, and tells whether a step can be taken"), ".compute_grad_norm"),
        (_only(True, "weights are drawn by their names"), ".override_module_apply"),
        (_only(True, "checkpoints keep the float32 weights"), ".load_from_fp32_weights"),
        (_only(1, "a second partition of the weights was not tried"), ".zero_hpz_partition_size"),
    ]
    for key in _keys(keys)
}
REFUSED = {
    key: (reason, remedy)
    for keys, reason, remedy in [
        (
            ".offload_optimizer .offload_param .cpu_offload .cpu_offload_param .cpu_offload_use_pin_memory"
            " .zenflow zero_force_ds_cpu_optimizer aio",
            "weights, gradients and optimizer state stay on the device",
            'Remove it, or say {"device": "none"}; stage 3 needs the least memory',
        ),
        (
            ".zero_quantized_weights .zero_quantized_nontrainable_weights .zero_quantized_gradients"
            " .zeropp_loco_param",
            "quantised weights or gradients change the losses",
            'Remove it; "communication_data_type": "bf16" halves what gradients send',
        ),
        (
            ".mics_shard_size .mics_hierarchical_params_gather",
            "DeepSpeed removed it",
            "Remove it; engine.kind=fsdp with engine.replicas shards within groups",
        ),
        (
            "bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states",
            "ZeRO would update bfloat16 weights, in which small updates are lost",
            "Remove it; the weights are float32, and precision.compute=bfloat16 the arithmetic",
        ),
        (
            "fp16 amp torch_autocast data_types.param_dtype data_types.buffer_dtype"
            " data_types.keep_in_fp32_modules",
            "precision comes from the recipe",
            "Remove it, and set precision.compute",
        ),
        ("bfloat16", "is the old name of bf16, which wins over it silently", "Write bf16"),
        ("optimizer", "the optimizer comes from the recipe", "Remove it, and set optim.*"),
        ("scheduler", "the learning rate comes from the recipe", "Remove it, and set train.schedule"),
        (".save_muon_momentum_buffer_in_memory", "there is no Muon here", "Remove it"),
        (
            "tensorboard wandb csv_monitor comet",
            "metrics are written to run.dir, and are cut back when a run goes on",
            "Remove it, and look at run.dir",
        ),
        (
            "flops_profiler autotuning",
            "it takes over some of the steps",
            "Remove it; wall_clock_breakdown and comms_logger are honoured",
        ),
        (
            "pipeline tensor_parallel expert_parallel sequence_parallel_size hybrid_engine"
            " seq_parallel_communication_data_type use_data_before_expert_parallelism"
            " .pipeline_loading_checkpoint",
            "every process runs the whole model: there is data parallelism only",
            "Remove it",
        ),
        (
            "data_efficiency curriculum_learning dataloader_drop_last",
            "data and their order come from the recipe",
            "Remove it, and set data.*",
        ),
        (
            "sparse_gradients sparse_attention compression_training quantize_training weight_quantization"
            " eigenvalue progressive_layer_drop graph_harvesting",
            "it would change the model or its gradients",
            "Remove it",
        ),
        (
            "elasticity",
            "the batch is the recipe's on any number of processes",
            "Remove it; a run goes on from its checkpoint on any number of processes",
        ),
        (
            "checkpoint nebula datastates_ckpt .elastic_checkpoint",
            "checkpoints are not DeepSpeed's: any engine goes on from them",
            "Remove it, and set train.save_every and run.resume",
        ),
        (
            "activation_checkpointing",
            "the model does not call DeepSpeed's, so it would do nothing",
            "Remove it",
        ),
        ("compile", "DeepSpeed would compile its hooks into the model", "Remove it"),
        (
            ".parameter_alignment .leaf_module .stage3_module_granularity_threshold .legacy_stage1",
            "it was not tried with these optimizers",
            "Remove it",
        ),
        (
            ".stage3_gather_fp16_weights_on_model_save",
            "is an old name",
            "Write stage3_gather_16bit_weights_on_model_save",
        ),
    ]
    for key in _keys(keys)
}

_BLOCKS = {key[:dot] for key in HONOURED for dot, letter in enumerate(key) if letter == "."}
_DEFAULTS = {
    "communication_data_type": "fp32",
    "data_types.grad_accum_dtype": "fp32",
    "timers.throughput.enabled": False,
}


def load(config: Config, n_procs: int) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets as its config. Raises ConfigError with everything wrong."""
    found = problems(config, n_procs)
    if found:
        raise ConfigError(found)
    tree: dict[str, Any] = {}
    for key, value in _merged(config, n_procs).items():
        *blocks, name = key.split(".")
        block = tree
        for part in blocks:
            block = block.setdefault(part, {})
        block[name] = value
    return tree


def stage(config: Config) -> int:
    """Return the ZeRO stage, 1 to 3, of a configuration without problems."""
    return int(_stated(config)[_STAGE])


def describe(config: Config, n_procs: int) -> str:
    """Return a line that names the stage and what was filled in where the file is silent."""
    stated = _stated(config)
    filled = {k: v for k, v in _merged(config, n_procs).items() if stated.get(k, "auto") == "auto"}
    items = ", ".join(f"{key}={json.dumps(value)}" for key, value in filled.items())
    return f"ZeRO stage {stage(config)} of {_name(config)}, filled in: {items}"


def problems(config: Config, n_procs: int) -> list[Problem | str]:
    """Return everything in the file that is not honoured, has a wrong value or contradicts the recipe."""
    try:
        stated = _stated(config)
    except ConfigError as error:
        return error.problems
    own = _of_the_recipe(config, n_procs)
    found: list[Problem | str] = []
    for key, value in stated.items():
        if wrong := _wrong(key, value, own, config.precision.compute):
            found.append(Problem(f"{_name(config)}: {key}", value, *wrong))
    if _STAGE not in stated and "zero_optimization" not in stated:
        reason = "is missing, and DeepSpeed would take 0"
        found.append(Problem(f"{_name(config)}: {_STAGE}", None, reason, "Write 1, 2 or 3"))
    return found


def _wrong(key: str, value: Any, own: dict[str, tuple[Any, str]], compute: str) -> tuple[str, str] | None:
    """Return the reason and the remedy if a key cannot have this value."""
    if value == "auto" and (key in own or key in _DEFAULTS):
        return None
    if key in own:
        expected, source = own[key]
        remedy = f'Write "auto" or {json.dumps(expected)}, or change the recipe'
        return None if value == expected else (f"contradicts {source}", remedy)
    if key in HONOURED:
        if not HONOURED[key].fit(value):
            return f"must be {HONOURED[key].words}", "Mend or remove it"
        if value == "bf16" and compute == "float32":
            return "rounds the gradients of precision.compute=float32", 'Write "fp32"'
        return None
    if key in _BLOCKS:
        return "must be a block of settings", "Write it as {…}"
    if key in REFUSED:
        return None if _is_off(value) else REFUSED[key]
    return "is not among the keys that are honoured", _nearest(key, [*own, *HONOURED])


def _name(config: Config) -> str:
    return config.engine.ds_config or "zero2"


def _of_the_recipe(config: Config, n_procs: int) -> dict[str, tuple[Any, str]]:
    """Return the settings that the recipe decides: by key, the value and the fields that it comes from."""
    train = config.train
    micros = max(train.global_batch // max(train.micro_batch * n_procs, 1), 1)
    batch = f"train.global_batch={train.global_batch}"
    slots = f"{n_procs} processes × train.micro_batch={train.micro_batch}"
    bf16 = config.precision.compute == "bfloat16"
    return {
        "train_batch_size": (train.global_batch, batch),
        "train_micro_batch_size_per_gpu": (train.micro_batch, f"train.micro_batch={train.micro_batch}"),
        "gradient_accumulation_steps": (micros, f"{batch} in {slots}"),
        "gradient_clipping": (train.clip_norm or 0.0, f"train.clip_norm={train.clip_norm}"),
        "bf16.enabled": (bf16, f"precision.compute={config.precision.compute}"),
        "zero_allow_untested_optimizer": (True, f"optim.rule={config.optim.rule}"),
    }


def _merged(config: Config, n_procs: int) -> dict[str, Any]:
    """Return the recipe's settings, our defaults and the file's, without what is refused but off."""
    stated = {k: v for k, v in _stated(config).items() if k in HONOURED and v != "auto"}
    own = {key: value for key, (value, _) in _of_the_recipe(config, n_procs).items()}
    return own | _DEFAULTS | stated


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value is None or value is False


def _nearest(key: str, known: list[str]) -> str:
    """Name the known key that is most like one, as a whole or by its last part."""
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    ]
    return f"Perhaps {near[0]} is meant; else remove it" if near else "Remove it"


def _stated(config: Config) -> dict[str, Any]:
    """Return what the file says, by dotted key. Raises ConfigError if there is none, or it is not JSON."""
    name = _name(config)
    path = find_shipped("ds_configs", name)
    if path is None:
        remedy = f"Give a JSON file or one of {', '.join(shipped_names('ds_configs'))}"
        raise ConfigError([Problem("engine.ds_config", name, "is neither a file nor a shipped one", remedy)])
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=_without_doubles)
        if not isinstance(tree, dict):
            raise ValueError("it is not a mapping")
    except (OSError, ValueError) as error:
        problem = Problem("engine.ds_config", name, f"cannot be read as JSON: {error}", "Mend the file")
        raise ConfigError([problem]) from error
    return dict(_flatten(tree))


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice, where JSON would keep the last."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        raise ValueError(f"a key stands twice among {', '.join(key for key, _ in pairs)}")
    return tree


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _BLOCKS and isinstance(value, dict):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, value
