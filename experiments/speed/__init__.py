"""What a step costs with each weighting: ``python -m experiments.speed --help``."""
