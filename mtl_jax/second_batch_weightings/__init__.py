"""Weightings that read gradients on a second batch, one method a file.

What a batch says of the inner product of two task gradients is biased where both are found on it:
their noise is the same. With the second one from another batch it is not.
"""
