"""Mixed-precision training for PyTorch: FP32 masters, loss scaling, exact accumulation.

Every public name is listed here by hand; importing this package imports only torch.
"""

from mixprec import formats, umup
from mixprec.accumulation import GradientAccumulator
from mixprec.cross_entropy import LinearCrossEntropy, LossDetails, linear_cross_entropy
from mixprec.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec.optimizer import MixedPrecision
from mixprec.precision import Precision, cast_model
from mixprec.ranges import watch

__version__ = "0.1.0"

__all__ = [
    "DynamicLossScaler",
    "GradientAccumulator",
    "LinearCrossEntropy",
    "LossDetails",
    "MixedPrecision",
    "Precision",
    "StaticLossScaler",
    "__version__",
    "cast_model",
    "formats",
    "linear_cross_entropy",
    "umup",
    "watch",
]
