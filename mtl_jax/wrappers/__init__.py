"""Weightings made of weightings: each takes one and returns one, and they compose."""
