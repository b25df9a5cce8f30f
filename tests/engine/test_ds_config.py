"""DeepSpeed's settings: what of a file is honoured, what is filled in, and what is refused."""

import json
from pathlib import Path

import pytest

from lrpretrain.config import Config, EngineConfig, PrecisionConfig, TrainConfig, shipped_names
from lrpretrain.engine import ds_config
from lrpretrain.errors import ConfigError
from lrpretrain.train import plan

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[2] / "ds_configs").iterdir())
MEANT = [
    (name, compute)
    for name in SHIPPED
    for compute in ("float32", "bfloat16")
    if (name, compute) != ("zero1_bf16", "float32")
]


def recipe(name=None, compute="float32", **train):
    """Return a configuration of 24 sequences a step in micro-batches of 2."""
    return Config(
        engine=EngineConfig(kind="zero", ds_config=name and str(name)),
        precision=PrecisionConfig(compute=compute),
        train=TrainConfig(micro_batch=2, global_batch=24, **train),
    )


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file of settings, of stage 2 unless it says more; gives its path."""

    def to(settings, text=None):
        stated = {"zero_optimization": {}} | settings
        if isinstance(stated["zero_optimization"], dict):
            stated["zero_optimization"] = {"stage": 2} | stated["zero_optimization"]
        path = tmp_path / "mine.json"
        path.write_text(text or json.dumps(stated))
        return path

    return to


def nested(key, value):
    """Return {"a": {"b": value}} for a.b."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def the_problem(config, n_procs=2):
    """Return the only problem of a configuration as a line."""
    (problem,) = ds_config.problems(config, n_procs)
    with pytest.raises(ConfigError) as error:
        ds_config.load(config, n_procs)
    assert error.value.problems == [problem]
    return str(problem)


def test_what_is_shipped_is_found_by_name():
    assert shipped_names("ds_configs") == SHIPPED
    assert {"zero1", "zero2", "zero3"} <= set(SHIPPED)


@pytest.mark.parametrize(("name", "compute"), MEANT)
def test_a_shipped_file_has_no_problems(name, compute):
    config = recipe(name, compute)
    assert plan.problems(config, 2) == []
    assert ds_config.stage(config) == int(name[4])
    assert ds_config.load(config, 2)["zero_optimization"] == read(name)["zero_optimization"]


def read(name):
    return json.loads((Path(__file__).parents[2] / "ds_configs" / f"{name}.json").read_text())


def test_zero1_bf16_is_for_bfloat16():
    problems = [str(p) for p in ds_config.problems(recipe("zero1_bf16"), 2)]
    assert problems == [
        "zero1_bf16: bf16.enabled=True: contradicts precision.compute=float32."
        ' Write "auto" or false, or change the recipe.'
    ]


@pytest.mark.parametrize(("compute", "bf16"), [("float32", False), ("bfloat16", True)])
@pytest.mark.parametrize(("clip_norm", "clipping"), [(None, 0.0), (0.5, 0.5)])
def test_what_is_silent_is_filled_in(compute, bf16, clip_norm, clipping):
    config = recipe(compute=compute, clip_norm=clip_norm)
    loaded = ds_config.load(config, 3)
    assert loaded.pop("zero_optimization") == read("zero2")["zero_optimization"]
    assert loaded == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": clipping,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "timers": {"throughput": {"enabled": False}},
    }
    line = ds_config.describe(config, 3)
    assert line.startswith("ZeRO stage 2 of zero2, filled in: train_batch_size=24, ")
    assert f"gradient_clipping={clipping}" in line and "timers.throughput.enabled=false" in line
    assert "bucket" not in line and "\n" not in line


def test_what_is_filled_in_is_printed():
    config = recipe("zero3")
    assert plan.describe(config, 3).splitlines()[-1] == ds_config.describe(config, 3)
    config.engine = EngineConfig(kind="fsdp")
    assert "zero" not in plan.describe(config, 3).lower()


def test_auto_and_what_agrees_are_accepted(write):
    own = {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 6,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    auto = {k: dict.fromkeys(v, "auto") if isinstance(v, dict) else "auto" for k, v in own.items()}
    config = recipe(write(own), "bfloat16", clip_norm=1.0)
    stated = ds_config.load(config, 2)
    assert "train_batch_size" not in ds_config.describe(config, 2)
    config = recipe(write(auto), "bfloat16", clip_norm=1.0)
    assert ds_config.load(config, 2) == stated
    assert "train_batch_size=24" in ds_config.describe(config, 2)


def test_the_file_decides_over_defaults(write):
    settings = {
        "communication_data_type": "bf16",
        "data_types": {"grad_accum_dtype": "bf16"},
        "timers": {"throughput": {"enabled": True}},
        "steps_per_print": 10,
        "zero_optimization": {"reduce_bucket_size": 5e8, "round_robin_gradients": True},
    }
    path = write(settings)
    loaded = ds_config.load(recipe(path, "bfloat16"), 2)
    assert loaded.items() >= json.loads(path.read_text()).items()


@pytest.mark.parametrize(
    ("key", "value", "source"),
    [
        ("train_batch_size", 32, "train.global_batch=24"),
        ("train_micro_batch_size_per_gpu", 4, "train.micro_batch=2"),
        ("gradient_accumulation_steps", 1, "train.global_batch=24 in 2 processes × train.micro_batch=2"),
        ("gradient_clipping", 1.0, "train.clip_norm=None"),
        ("bf16.enabled", True, "precision.compute=float32"),
        ("zero_allow_untested_optimizer", False, "optim.rule=galore"),
    ],
)
def test_a_contradiction_names_both_sides(write, key, value, source):
    path = write(nested(key, value))
    line = the_problem(recipe(path))
    assert line.startswith(f"{path}: {key}={value!r}: contradicts {source}. Write ")


REFUSED = {
    "zero_optimization.offload_optimizer": {"device": "cpu"},
    "zero_optimization.offload_param": {"device": "nvme", "nvme_path": "/tmp"},
    "zero_optimization.cpu_offload": True,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zeropp_loco_param": {"err_beta": 0.8},
    "zero_optimization.mics_shard_size": 2,
    "zero_optimization.elastic_checkpoint": True,
    "zero_optimization.save_muon_momentum_buffer_in_memory": True,
    "zero_optimization.legacy_stage1": True,
    "zero_optimization.leaf_module": {"classes": ["LlamaMLP"]},
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": True,
    "bf16.bf16_master_weights_and_grads": True,
    "bf16.bf16_optimizer_states": True,
    "bfloat16": {"enabled": True},
    "fp16": {"enabled": True},
    "amp": {"enabled": True},
    "torch_autocast": {"enabled": True},
    "data_types.param_dtype": "bf16",
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "tensorboard": {"enabled": True},
    "wandb": {"enabled": True},
    "csv_monitor": {"enabled": True},
    "flops_profiler": {"enabled": True},
    "autotuning": {"enabled": True},
    "pipeline": {"stages": 2},
    "tensor_parallel": {"autotp_size": 2},
    "sequence_parallel_size": 2,
    "sparse_gradients": True,
    "curriculum_learning": {"enabled": True},
    "data_efficiency": {"enabled": True},
    "compression_training": {"weight_quantization": {}},
    "elasticity": {"enabled": True},
    "checkpoint": {"load_universal": True},
    "activation_checkpointing": {"partition_activations": True},
    "compile": {"deepcompile": True},
}


@pytest.mark.parametrize(("key", "value"), REFUSED.items(), ids=REFUSED)
def test_what_is_refused_has_a_reason_and_a_remedy(write, key, value):
    path = write(nested(key, value))
    line = the_problem(recipe(path))
    start = f"{path}: {key}={value!r}: "
    assert line.startswith(start)
    reason, remedy = line.removeprefix(start).split(". ", 1)
    assert len(reason) > 10 and remedy.startswith(("Remove it", "Write "))
    assert "not among the keys" not in reason


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": {"enabled": False, "loss_scale": 0}, "amp": {"enabled": False}, "sparse_gradients": False},
        {"optimizer": None, "tensorboard": {"enabled": False}, "bf16": {}},
        {"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}},
        {"zero_optimization": {"cpu_offload": False, "zero_quantized_weights": False, "zenflow": None}},
    ],
)
def test_what_is_refused_but_off_is_passed_over(write, settings):
    assert ds_config.load(recipe(write(settings)), 2) == ds_config.load(recipe(write({})), 2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("zero_optimization.stage", 0, "1, 2 or 3 (stage 0 is engine.kind=ddp)"),
        ("zero_optimization.stage", 4, "1, 2 or 3"),
        ("zero_optimization.stage", True, "1, 2 or 3"),
        ("zero_optimization.stage", "2", "1, 2 or 3"),
        ("zero_optimization.stage", "auto", "1, 2 or 3"),
        ("zero_optimization.reduce_bucket_size", 0, "a whole number, at least 1"),
        ("zero_optimization.reduce_bucket_size", 1.5, "a whole number"),
        ("zero_optimization.reduce_bucket_size", True, "a whole number"),
        ("zero_optimization.reduce_bucket_size", "5e8", "a whole number"),
        ("zero_optimization.reduce_bucket_size", "auto", "a whole number"),
        ("zero_optimization.reduce_bucket_size", float("inf"), "a whole number"),
        ("zero_optimization.allgather_bucket_size", 501, "an even whole number"),
        ("zero_optimization.stage3_max_live_parameters", -1, "a whole number, at least 0"),
        ("zero_optimization.overlap_comm", "true", "true or false"),
        ("zero_optimization.overlap_comm", 1, "true or false"),
        ("zero_optimization.overlap_comm", None, "true or false"),
        ("zero_optimization.compute_grad_norm", False, "true (the norm is logged"),
        ("zero_optimization.zero_hpz_partition_size", 4, "1 (a second partition"),
        ("zero_optimization.zero_hpz_partition_size", True, "1 (a second partition"),
        ("zero_optimization.allgather_partitions", False, "true (false does nothing"),
        ("bf16.check_grad_overflow", False, "true (a step"),
        ("communication_data_type", "fp16", '"fp32" or "bf16"'),
        ("communication_data_type", ["fp32"], '"fp32" or "bf16"'),
        ("data_types.grad_accum_dtype", "float32", '"fp32" or "bf16"'),
        ("prescale_gradients", True, "false (gradients are averaged"),
        ("gradient_predivide_factor", 2.0, "1 (gradients are averaged"),
        ("gradient_allreduce_op", "sum", '"mean" (the loss'),
        ("steps_per_print", 0, "a whole number, at least 1"),
        ("zero_optimization", True, "a block of settings"),
        ("bf16", True, "a block of settings"),
        ("timers.throughput", False, "a block of settings"),
    ],
)
def test_a_value_that_deepspeed_might_swallow_is_refused(write, key, value, words):
    path = write(nested(key, value))
    line = the_problem(recipe(path, "bfloat16"))
    assert line.startswith(f"{path}: {key}={value!r}: must be {words}")


@pytest.mark.parametrize("key", ["communication_data_type", "data_types.grad_accum_dtype"])
def test_float32_gradients_are_not_rounded(write, key):
    assert "rounds the gradients of precision.compute=float32" in the_problem(
        recipe(write(nested(key, "bf16")))
    )
    assert ds_config.problems(recipe(write(nested(key, "bf16")), "bfloat16"), 2) == []


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train_batchsize", "Perhaps train_batch_size is meant"),
        ("zero_optimization.reduce_bucket", "Perhaps zero_optimization.reduce_bucket_size is meant"),
        (
            "zero_optimization.prefetch_bucket_size",
            "Perhaps zero_optimization.stage3_prefetch_bucket_size is meant",
        ),
        ("bf16.enable", "Perhaps bf16.enabled is meant"),
        ("stage", "Perhaps zero_optimization.stage is meant"),
        ("bf16.bf16_master_weights_and_gradients", "Remove it"),
        ("_comment", "Remove it"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_named(write, key, remedy):
    path = write(nested(key, 1))
    line = the_problem(recipe(path))
    assert line.startswith(f"{path}: {key}=1: is not among the keys that are honoured. {remedy}")


def test_a_file_without_a_stage_is_refused(write):
    assert "zero_optimization.stage=None: is missing" in the_problem(recipe(write({}, text="{}")))
    text = '{"zero_optimization": {"overlap_comm": true}}'
    assert "zero_optimization.stage=None: is missing" in the_problem(recipe(write({}, text=text)))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1"),
        ("[1]", "it is not a mapping"),
        ("# a comment\n{}", "line 1"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "twice among stage, stage"),
        ("\x00", "line 1"),
    ],
)
def test_a_file_that_is_not_json_is_refused(write, text, words):
    line = the_problem(recipe(write({}, text=text)))
    assert "engine.ds_config=" in line and "cannot be read as JSON: " in line and words in line


def test_a_file_that_is_not_there_is_refused():
    line = the_problem(recipe("zero4"))
    assert line == (
        "engine.ds_config='zero4': is neither a file nor a shipped one. Give a JSON file or one of "
        + ", ".join(SHIPPED)
        + "."
    )


def test_everything_wrong_is_reported_at_once(write):
    settings = {
        "optimizer": {"type": "Adam"},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}, "stge": 1},
    }
    problems = ds_config.problems(recipe(write(settings)), 2)
    assert sorted(p.field.partition(": ")[2] for p in problems) == [
        "gradient_clipping",
        "optimizer",
        "zero_optimization.offload_param",
        "zero_optimization.stage",
        "zero_optimization.stge",
    ]


def test_the_file_is_looked_at_before_a_run_under_zero_only():
    config = recipe("zero4")
    (problem,) = plan.problems(config, 2)
    assert "is neither a file nor a shipped one" in str(problem)
    config.engine.kind = "fsdp"
    (problem,) = plan.problems(config, 2)
    assert "engine.kind=fsdp has no use for" in str(problem)


@pytest.fixture(scope="module")
def deepspeed():
    """Import DeepSpeed for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield pytest.importorskip("deepspeed")


@pytest.mark.parametrize(("name", "compute"), MEANT)
def test_deepspeed_reads_what_is_loaded(deepspeed, name, compute):
    config = recipe(name, compute, clip_norm=0.5)
    understood = deepspeed.DeepSpeedConfig(ds_config.load(config, 1))
    assert understood.zero_optimization_stage == ds_config.stage(config)
    assert understood.gradient_accumulation_steps == 12
    assert understood.gradient_clipping == 0.5
    assert understood.bfloat16_config.enabled == (compute == "bfloat16")
    assert str(understood.communication_data_type) == "torch.float32"
    assert understood.grad_accum_dtype == "fp32"
    assert not understood.timers_config.enabled
    stated = read(name)["zero_optimization"]
    assert understood.zero_config.model_dump(by_alias=True).items() >= stated.items()


def test_every_key_of_deepspeed_is_honoured_or_refused(deepspeed):
    """A new DeepSpeed with new keys fails here: decide about them."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    blocks = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    theirs = {
        f"{block}.{f.alias or name}" for block, m in blocks.items() for name, f in m.model_fields.items()
    }
    honoured = {*ds_config.HONOURED, "bf16.enabled"}
    assert not honoured & ds_config.REFUSED.keys()
    assert theirs - {"comms_logger.prof_ops"} <= honoured | ds_config.REFUSED.keys()
    assert {k for k in honoured if k.rpartition(".")[0] in blocks} <= theirs


def test_every_key_that_is_honoured_at_the_top_is_one_of_deepspeed(deepspeed):
    """It ignores others: so a value that differs from the default must be seen."""
    base = ds_config.load(recipe(), 1)
    changed = {
        "gradient_clipping": 0.5,
        "communication_data_type": "bf16",
        "prescale_gradients": True,
        "gradient_predivide_factor": 2.0,
        "gradient_allreduce_op": "sum",
        "managed_gradient_accumulation": False,
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "dump_state": True,
        "zero_allow_untested_optimizer": False,
    }
    batch = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    blocks = {key for key, value in base.items() if isinstance(value, dict)}
    assert {k for k in [*ds_config.HONOURED, *base] if "." not in k} - blocks == changed.keys() | batch
    was = deepspeed.DeepSpeedConfig(base)
    for key, value in changed.items():
        now = deepspeed.DeepSpeedConfig(base | {key: value})
        assert getattr(now, key) != getattr(was, key), key
