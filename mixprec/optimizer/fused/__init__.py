"""One recorded step of an element-wise rule, run as one program."""
