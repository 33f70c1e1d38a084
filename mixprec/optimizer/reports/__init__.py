"""What is said of steps: counts, warnings, errors, and how each parameter is stepped."""
