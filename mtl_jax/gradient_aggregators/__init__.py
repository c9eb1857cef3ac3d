"""Aggregators, which combine the task gradients coordinate by coordinate, one method a file."""
