"""Optimizers: rules as pages of their papers, and the torch optimizers that run them on any sharding."""

from lrpretrain.optim.adafactor import GaLoreAdafactor
from lrpretrain.optim.galore import GaLoreAdamW
from lrpretrain.optim.gradnormlorp import GradNormLoRPAdamW
from lrpretrain.optim.loro import LOROAdamW
from lrpretrain.optim.optimizer import AdamW, ShardedOptimizer

__all__ = ["AdamW", "GaLoreAdafactor", "GaLoreAdamW", "GradNormLoRPAdamW", "LOROAdamW", "ShardedOptimizer"]
