"""The problems: each in the module of its name, built by the function of its name."""

import importlib

from mtl_jax.compare import load_problem, look_up
from mtl_jax.compare.problem import Problem

PROBLEMS = {
    "multimnist": False,
    "utterances": False,
    "cifar100": True,
    "cifar100_superclasses": True,
    "cifar100_resnet20": True,
    "cifar100_vgg16": True,
    "cifar10_groups": True,
    "ag_news": True,
    "news_and_utterances": True,
}
"""The problems by name, and whether their builder takes ``data_dir``."""


def build_problem(name: str, data_dir: str | None = None) -> Problem:
    """Build a problem by its name; its module is imported only now.

    Args:
      name: one of these names, or ``package.module:name`` as for :func:`load_problem`.
      data_dir: the folder that holds data sets prepared by tensorflow-datasets, for the problems
        that read such; ``None`` for its default.

    Raises:
      ValueError: if the name is unknown; the message lists the known ones. As
        :func:`load_problem`.
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.
    """
    if ":" in name:
        return load_problem(name, data_dir)
    options = {"data_dir": data_dir} if look_up(name, PROBLEMS, "problem") else {}
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)(**options)
