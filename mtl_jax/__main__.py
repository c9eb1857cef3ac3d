"""The program ``mtl-jax``, also ``python -m mtl_jax``."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    try:
        import mtl_jax.compare.command_line as command_line
    except ModuleNotFoundError as error:
        print(
            f"error: {error}. The program mtl-jax needs what the extra `compare` installs:\n\n"
            "    pip install 'mtl-jax[compare]'\n",
            file=sys.stderr,
        )
        sys.exit(2)
    command_line.main(arguments)


if __name__ == "__main__":
    main()
