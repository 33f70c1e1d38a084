"""Mixed-precision training for PyTorch: FP32 masters, loss scaling, exact accumulation.

Every public name is listed here by hand; importing this package imports only torch.
"""

from mixprec import formats
from mixprec.loss_scaling import DynamicLossScaler, StaticLossScaler
from mixprec.optimizer import MixedPrecision

__version__ = "0.1.0"

__all__ = ["DynamicLossScaler", "MixedPrecision", "StaticLossScaler", "__version__", "formats"]
