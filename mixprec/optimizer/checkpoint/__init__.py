"""Checkpoints: read, checked, tried, and loaded whole or not at all."""
