"""Where the values of a model lie against the range of every format."""

from mixprec.ranges.watch import watch

__all__ = ["watch"]
