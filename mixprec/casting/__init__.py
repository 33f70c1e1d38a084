"""Casting a model to a 16-bit format around islands of FP32."""
