"""Pretrain LLaMA models with low-rank optimizers, sharded with FSDP2 or DeepSpeed."""

__version__ = "0.1.0"
