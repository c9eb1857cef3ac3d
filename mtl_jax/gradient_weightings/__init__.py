"""Weightings that read the task gradients coordinate by coordinate, one method a file."""
