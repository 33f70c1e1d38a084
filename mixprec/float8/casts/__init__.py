"""Matrices in FP8 with their transposes: made by kernels, or by the same steps in plain torch."""
