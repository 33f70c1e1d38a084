"""What the gradients of a step are worth, and the one factor they are multiplied by."""
