"""The micro-batches of one step: their gradients, losses and tokens."""
