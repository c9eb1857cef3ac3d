"""CIFAR-100 with ResNet-20 and the recipe of the literature."""

from experiments.networks.cifar import ResNet
from experiments.problems.cifar100_benchmark import cifar100_benchmark
from mtl_jax.compare.problem import Problem


def cifar100_resnet20(data_dir: str | None = None, *, held_out: float = 0.1) -> Problem:
    """Build CIFAR-100 for ResNet-20: :func:`cifar100_benchmark`, meant for a GPU."""
    return cifar100_benchmark("cifar100_resnet20", "ResNet-20", ResNet(), data_dir, held_out)
