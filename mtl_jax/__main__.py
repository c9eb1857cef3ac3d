"""The program ``mtl-jax``, also ``python -m mtl_jax``."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run ``mtl-jax compare`` or ``mtl-jax list``."""
    try:
        import mtl_jax.compare.console as console
    except ModuleNotFoundError as error:
        print(
            f"error: {error}. The program mtl-jax needs what the extra `compare` installs:\n\n"
            "    pip install 'mtl-jax[compare]'\n",
            file=sys.stderr,
        )
        sys.exit(2)
    console.main(arguments)


if __name__ == "__main__":
    main()
