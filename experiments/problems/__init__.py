"""The problems: a file for each data set, with a function for each problem."""

from mtl_jax.compare import load_problem, look_up
from mtl_jax.compare.problem import Problem

PROBLEMS = {
    "multimnist": "multimnist",
    "utterances": "utterances",
    "cifar100": "cifar100",
    "cifar100_superclasses": "cifar100_superclasses",
    "cifar100_resnet20": "cifar100_benchmark",
    "cifar100_vgg16": "cifar100_benchmark",
    "cifar10_groups": "cifar10_groups",
    "ag_news": "ag_news",
    "news_and_utterances": "news_and_utterances",
    "qm9": "qm9",
    "qm9_all": "qm9",
    "tox21": "tox21",
    "tox21_random": "tox21",
    "atis": "atis",
    "nyuv2": "nyuv2",
    "nyuv2_40": "nyuv2",
    "burgers": "pde",
    "helmholtz": "pde",
    "helmholtz_small": "pde",
    "klein_gordon": "pde",
}
"""For each problem the module that has the function of its name."""


def build_problem(name: str, data_dir: str | None = None) -> Problem:
    """Build a problem by its name; its module is imported only now.

    Args:
      name: one of these names, or ``package.module:name`` as for :func:`load_problem`.
      data_dir: the folder that holds the data, for the problems that read them from one; ``None``
        for its default.

    Raises:
      ValueError: if the name is unknown; the message lists the known ones. As
        :func:`load_problem`.
      FileNotFoundError: if the data are not there and cannot be prepared here.
    """
    if ":" not in name:
        name = f"{__name__}.{look_up(name, PROBLEMS, 'problem')}:{name}"
    return load_problem(name, data_dir)
