r"""The CIFAR-100 benchmark of MLS-Bench: ``python -m experiments.recipes.cifar100_benchmark``.

The benchmark's rule: SGD at 0.1 with momentum 0.9, weight decay 5e-4 and a half cosine, 200 epochs,
batches of 128, crop and flip. What counts is the fine accuracy on the *test* data in the epoch
where that is best, so the published figures are of an epoch that the test data chose; this program
shows the last epoch's beside it. `The benchmark <https://mls-bench.com/tasks/cv-multitask-loss>`_
has no row for equal weights.

What differs from it: 1 in 500 of the training pictures is held out for validation, since a
comparison wants some; the learning rate falls with every step, not every epoch; the initial
parameters are drawn in our way.

For the comparison's own rule, a tenth of the training pictures held out to choose the epoch, and
task gradients at the representation::

    python -m experiments.compare --problem cifar100_resnet20 cifar100_vgg16 --no-alone \
        --weightings equal adaptive dwa pcgrad uncertainty --data-dir DIR
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import Annotated, Literal

import numpy as np
import tabulate
import tyro

from experiments.problems.cifar100_benchmark import cifar100_resnet20, cifar100_vgg16
from mtl_jax.compare import Problem, Results, compare, named_weightings

NETWORKS = {"resnet20": cifar100_resnet20, "vgg16": cifar100_vgg16}

PUBLISHED = {
    "cifar100_resnet20": {"dwa": 67.81, "pcgrad": 64.53, "uncertainty": 66.81},
    "cifar100_vgg16": {"dwa": 73.90, "pcgrad": 74.26, "uncertainty": 72.56},
}
"""The published fine accuracies in %, for each problem and weighting."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Run the public CIFAR-100 benchmark and print the published figures beside what came out.

    It wants a GPU and all 50,000 training pictures. Tables, pictures and numbers are left in
    RUNS_DIR/cifar100_benchmark.
    """

    networks: Annotated[
        tuple[Literal["resnet20", "vgg16"], ...], tyro.conf.arg(help="The networks to train.")
    ] = ("resnet20", "vgg16")
    weightings: tuple[str, ...] = ("equal", "adaptive", "dwa", "pcgrad", "uncertainty")
    """The weightings to compare; equal weights are always run."""
    seeds: int = 3
    """Number of seeds: 0, 1, ..."""
    epochs: int = 200
    """Passes over the training data."""
    batch_size: int = 128
    """Examples a step."""
    data_dir: str | None = None
    """Folder with prepared tensorflow-datasets data."""
    runs_dir: pathlib.Path = pathlib.Path("runs")
    """Folder that holds the results of all comparisons."""


def over_all_parameters(problem: Problem) -> Problem:
    """The problem without its parts, so that task gradients are those of all parameters.

    As in the benchmark's PCGrad; at the representation, as a comparison else takes them, they are
    other vectors, and conflict elsewhere.
    """
    losses = problem.losses
    return dataclasses.replace(
        problem, losses=lambda *args: losses(*args), encoder=None, heads=None, shared=None
    )


def fine_accuracies(results: Results, problem: str) -> str:
    """The test accuracy of the fine classes, in the best epoch and in the last, as a table."""
    published, by_weighting = PUBLISHED[problem], {}
    for run in results.runs:
        if run.problem == problem:
            accuracies = by_weighting.setdefault(run.weighting, [])
            if run.failure is None:
                accuracies.append(run.metrics["test"]["fine"]["accuracy"])
    rows = []
    for name, accuracies in by_weighting.items():
        epochs = np.array(accuracies)
        if len(epochs):
            columns = [_mean_and_deviation(epochs.max(axis=1)), _mean_and_deviation(epochs[:, -1])]
        else:
            columns = ["failed", "failed"]
        rows.append([name, len(epochs), *columns, published.get(name, "")])
    headers = [
        "weighting",
        "seeds",
        "best epoch on test data",
        "last epoch",
        "published (best epoch)",
    ]
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _mean_and_deviation(shares: np.ndarray) -> str:
    deviation = shares.std(ddof=1) if len(shares) > 1 else float("nan")
    return f"{100 * shares.mean():.2f} ± {100 * deviation:.2f}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after a message if the configuration is wrong."""
    program = "python -m experiments.recipes.cifar100_benchmark"
    config = tyro.cli(Config, prog=program, args=arguments)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        weightings = named_weightings(list(config.weightings))
        problems = [
            over_all_parameters(NETWORKS[network](config.data_dir, held_out=0.002)).with_settings(
                epochs=config.epochs, batch_size=config.batch_size
            )
            for network in config.networks
        ]
        results = compare(
            problems,
            weightings,
            config.runs_dir / "cifar100_benchmark",
            seeds=range(config.seeds),
            alone=False,
            resume=True,
            command=shlex.join([*program.split(), *given]),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for problem in problems:
        print(
            f"\n{problem.name}: fine accuracy in % (mean ± deviation over the seeds), "
            f"{problem.size('train')} training pictures, {problem.epochs} epochs\n"
        )
        print(fine_accuracies(results, problem.name))


if __name__ == "__main__":
    main()
