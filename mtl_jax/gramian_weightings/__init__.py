"""Weightings that read the Gramian of the task gradients, one method a file.

A method sees the K x K inner products of the task gradients, and so everything about them that
does not depend on the choice of coordinates: the same weights come out at a representation, over
the shared parameters, and after any rotation of the parameter space.
"""
