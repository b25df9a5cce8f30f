"""The training loop and what it consults: schedule, signals, evaluation."""
