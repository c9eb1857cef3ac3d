"""Recipes of published benchmarks, each a program."""
