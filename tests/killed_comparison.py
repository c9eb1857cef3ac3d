"""A small comparison as a program: ``python -m killed_comparison FOLDER PROGRAMS``."""

import sys

import jax
from jax.experimental.compilation_cache import compilation_cache
from toy_problem import make_problem

from mtl_jax.compare import compare_and_report, named_weightings


def keep_programs(folder: str) -> None:
    """Compile each program once for all processes that name this folder."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()


def run_comparison(folder: str, resume: bool) -> None:
    weightings = named_weightings(["random_weighting"])
    problem = make_problem(epochs=20)
    compare_and_report(
        [problem],
        weightings,
        folder,
        seeds=[0],
        alone=False,
        checkpoint_seconds=0,
        resume=resume,
    )


if __name__ == "__main__":
    folder, programs = sys.argv[1:]
    keep_programs(programs)
    print("started", flush=True)
    run_comparison(folder, resume=True)
