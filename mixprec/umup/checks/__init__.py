"""Whether a model does what the table promises, in numbers."""
