"""What a rule is: how it is called over stand-ins, what its code can name, how it may run."""
