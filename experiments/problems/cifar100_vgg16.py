"""CIFAR-100 with VGG-16 and the recipe of the literature."""

from experiments.networks.cifar import VGG
from experiments.problems.cifar100_benchmark import cifar100_benchmark
from mtl_jax.compare.problem import Problem


def cifar100_vgg16(data_dir: str | None = None, *, held_out: float = 0.1) -> Problem:
    """Build CIFAR-100 for VGG-16-BN: :func:`cifar100_benchmark`, meant for a GPU."""
    return cifar100_benchmark("cifar100_vgg16", "VGG-16-BN", VGG(), data_dir, held_out)
