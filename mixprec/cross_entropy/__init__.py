"""Cross entropy of an output layer, without its logits and with the gradient of the sum."""

from mixprec.cross_entropy.loss import LinearCrossEntropy, LossDetails, linear_cross_entropy

__all__ = ["LinearCrossEntropy", "LossDetails", "linear_cross_entropy"]
