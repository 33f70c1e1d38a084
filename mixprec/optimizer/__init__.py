"""MixedPrecision: the rule of any `torch.optim.Optimizer`, run on exact FP32 masters."""

from mixprec.optimizer.mixed_precision import MixedPrecision

__all__ = ["MixedPrecision"]
