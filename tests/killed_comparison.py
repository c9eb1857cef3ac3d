"""A small comparison as a program: ``python -m killed_comparison FOLDER CACHE``."""

import sys

import jax
from toy_problem import make_problem

from mtl_jax.compare import compare_and_report, named_weightings


def main(folder: str, cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", f"{cache}/programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    print("started", flush=True)
    compare_and_report(
        [make_problem(epochs=12)],
        named_weightings(["random_weighting", "graddrop"]),
        folder,
        seeds=[0],
        alone=False,
        resume=True,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
