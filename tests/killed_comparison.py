"""A small comparison as a program: ``python -m killed_comparison FOLDER``."""

import sys
from unittest import mock

from toy_problem import make_problem

from mtl_jax.compare import compare, training


def run_comparison(folder: str, resume: bool) -> None:
    """With checkpoints within epochs and at their ends."""
    with mock.patch.object(training, "STEPS", 4):
        compare(
            make_problem(epochs=20),
            ["random_weighting"],
            folder,
            seeds=[0],
            alone=False,
            checkpoint_seconds=0,
            resume=resume,
        )


if __name__ == "__main__":
    print("started", flush=True)
    run_comparison(sys.argv[1], resume=True)
