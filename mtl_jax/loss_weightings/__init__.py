"""Weightings that read the task losses: a step costs one forward and one backward pass.

One method a file; :mod:`~mtl_jax.loss_weightings._statistics` holds what several of them share.
"""
