"""From a rule's own code to a program: one step, run on small tensors and written down."""
