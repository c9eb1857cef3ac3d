"""Problems by name."""

import importlib
import inspect
import os
import sys
from typing import Any

from mtl_jax.compare.problem import Problem


def load_problem(name: str, data_dir: str | None = None) -> Problem:
    """The problem at ``package.module:name``.

    Args:
      name: a module that can be imported, from the working folder too, and in it the name of a
        :class:`Problem`, or of a function that returns one.
      data_dir: handed to the function, if it takes an argument of this name.

    Returns:
      The problem.

    Raises:
      ValueError: if there is no such module or name, or it is not a problem.

    Example:
      >>> from mtl_jax.compare import load_problem
      >>> load_problem("math:tau")
      Traceback (most recent call last):
      ValueError: 'math:tau' is a float; a Problem is wanted, or a function that returns one.
    """
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise ValueError(f"A problem is named as package.module:name; got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The message of a module that the user's own imports in vain says which one.
        raise ValueError(f"{name!r}: {error}.") from error
    if not hasattr(module, attribute):
        raise ValueError(f"The module {module_name!r} has no {attribute!r}.")
    found: Any = getattr(module, attribute)
    if callable(found):
        takes_folder = "data_dir" in inspect.signature(found).parameters
        found = found(data_dir=data_dir) if takes_folder else found()
    if not isinstance(found, Problem):
        raise ValueError(
            f"{name!r} is a {type(found).__name__}; a Problem is wanted, or a function that "
            "returns one."
        )
    return found
