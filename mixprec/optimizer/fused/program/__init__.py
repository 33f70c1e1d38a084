"""A program: a rule's operations on elements, and what can be proved of them."""
