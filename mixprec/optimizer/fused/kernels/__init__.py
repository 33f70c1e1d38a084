"""From a program to one kernel, and its launch; or its twin in plain torch."""
