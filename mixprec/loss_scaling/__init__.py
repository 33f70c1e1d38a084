"""Loss scaling: lift gradients into FP16's range for the way back, take the factor off in FP32."""

from mixprec.loss_scaling.scaler import DynamicLossScaler, StaticLossScaler

__all__ = ["DynamicLossScaler", "StaticLossScaler"]
