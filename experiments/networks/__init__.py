"""Encoders and heads, in Flax."""
