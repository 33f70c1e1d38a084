"""Unit scaling and u-muP."""

from mixprec.umup import functional, scaling
from mixprec.umup.scaling import scale_bwd, scale_fwd

__all__ = ["functional", "scale_bwd", "scale_fwd", "scaling"]
