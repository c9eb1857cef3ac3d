"""What a step costs with each weighting: ``python -m benchmarks.speed --help``."""
