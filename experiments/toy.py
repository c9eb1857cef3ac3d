"""Paths of the weightings on a landscape of two losses: ``python -m experiments.toy --help``."""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.console
import rich.progress
import tabulate
import tyro
from jaxtyping import Array, Float

import mtl_jax
from mtl_jax import RunSettings
from mtl_jax._base import Aggregator, Weighting
from mtl_jax.compare import look_up
from mtl_jax.methods import MAKES

STARTS = ((-8.5, 7.5), (-8.5, -5.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
"""The published starting points: the first three are those of Liu et al., and all but the second
those of Navon et al., who have the origin besides, where the landscape has no derivative."""

OFFSET = 21.0
"""What is added to the losses, whose minima are just above -20, for the weightings that are defined
for positive losses only; as in the published code of FAMO. No gradient changes by it."""

WINDOW = 100
"""The steps that stand for an epoch, for the weightings that have one."""


KNOWN = MAKES | {
    "constant": lambda settings: mtl_jax.equal(),
    "famo": lambda settings: mtl_jax.famo(weight_decay=0.0),
}
"""The weightings as a comparison runs them, but FAMO as its authors ran it on this landscape."""


def landscape(x: Float[Array, "2"], first_scale: float = 1.0) -> dict[str, Float[Array, ""]]:
    r"""Two losses of a point whose gradients conflict and differ in size.

    .. math:: L_k = \max(\tanh(x_2 / 2), 0)\, f_k + \max(\tanh(-x_2 / 2), 0)\, g_k

    .. math:: f_1 &= \log \max(|(-x_1 - 7) / 2 - \tanh(-x_2)|, 5 \cdot 10^{-6}) + 6 \\
              f_2 &= \log \max(|(-x_1 + 3) / 2 + \tanh(-x_2) + 2|, 5 \cdot 10^{-6}) + 6 \\
              g_1 &= ((-x_1 + 7)^2 + 0.1 (-x_2 - 8)^2) / 10 - 20 \\
              g_2 &= ((-x_1 - 7)^2 + 0.1 (-x_2 - 8)^2) / 10 - 20

    In the upper half plane each loss is a steep and narrow valley; the valleys lie side by side
    and lead down to the lower half plane, where the losses are two bowls.

    Args:
      x: the point.
      first_scale: what the first loss is multiplied by: 1 in Liu et al., 0.1 in Navon et al. and
        in the paper of FAMO.

    Returns:
      The losses ``first`` and ``second``.

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, 2021; the formula as in their code

      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022
    """
    across, along = x

    def valley(distance: Array) -> Array:
        return jnp.log(jnp.maximum(jnp.abs(distance), 5e-6)) + 6

    def bowl(centre: float) -> Array:
        return ((across - centre) ** 2 + 0.1 * (along + 8) ** 2) / 10 - 20

    above = jnp.maximum(jnp.tanh(along / 2), 0)
    below = jnp.maximum(jnp.tanh(-along / 2), 0)
    first = above * valley((-across - 7) / 2 + jnp.tanh(along)) + below * bowl(7.0)
    second = above * valley((-across + 3) / 2 - jnp.tanh(along) + 2) + below * bowl(-7.0)
    return {"first": first_scale * first, "second": second}


def pareto_set(number: int = 401) -> Float[np.ndarray, "number 2"]:
    """The points from which neither loss can be lowered without raising the other.

    They minimise the weighted means of the losses, all below the axis. There a mean with weight p
    on the first loss is ``tanh(-x2 / 2)`` times a bowl around ``x1 = 7 (2 p - 1)``, and setting its
    derivative by x2 to 0 gives x2.
    """
    share = np.linspace(0, 1, number)
    across, along = 7 * (2 * share - 1), np.full(number, -8.0)
    for _ in range(100):  # a contraction
        bowl = (196 * share * (1 - share) + 0.1 * (along + 8) ** 2) / 10 - 20
        along = -8 + 25 * bowl / np.cosh(along / 2) ** 2 / np.tanh(-along / 2)
    return np.stack([across, along], axis=1)


def distance_to_front(points: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "points"]:
    """How far each point is from the Pareto set."""
    return np.linalg.norm(points[:, None] - pareto_set(), axis=-1).min(axis=1)


def paths(
    weighting: Weighting | Aggregator,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    first_scale: float = 1.0,
) -> Float[Array, "starts steps 2"]:
    """The points that training passes, from every start, in one compiled program.

    Args:
      weighting: the weighting, or the aggregator.
      optimizer: the optimizer of the point.
      steps: the number of steps.
      first_scale: the scale of the first loss.
    """

    def losses_fn(x: Array) -> dict[str, Array]:
        losses = landscape(x, first_scale)
        return {
            "first": losses["first"] + OFFSET * first_scale,
            "second": losses["second"] + OFFSET,
        }

    train_step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, weighting), optimizer)

    def run(start: Array, key: Array) -> Array:
        state = train_step.init(start, weighting_key=key)

        def step(state: mtl_jax.TrainState, _: None) -> tuple[mtl_jax.TrainState, Array]:
            state, _value = train_step(state)
            return state, state.params

        return jax.lax.scan(step, state, length=steps)[1]

    keys = jax.random.split(jax.random.key(0), len(STARTS))
    return jax.jit(jax.vmap(run))(jnp.array(STARTS), keys)


def figure(
    found: Mapping[str, np.ndarray], first_scale: float, near: float
) -> matplotlib.figure.Figure:
    """The paths of each weighting over the mean of the two losses, a panel for each weighting.

    Args:
      found: the paths of each weighting, ``[starts, steps, 2]``.
      first_scale: the scale of the first loss.
      near: the distance to the Pareto set up to which a path has reached it.
    """
    columns = min(4, len(found))
    rows = -(-len(found) // columns)
    picture = matplotlib.figure.Figure(figsize=(3.4 * columns, 3.5 * rows), layout="constrained")
    axes = list(picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    side = np.linspace(-11, 11, 200)
    grid = jnp.array(np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2))
    losses = jax.jit(jax.vmap(lambda x: landscape(x, first_scale)))(grid)
    mean = (np.asarray(losses["first"] + losses["second"]) / 2).reshape(len(side), len(side))
    front = pareto_set()
    for axis, (name, lines) in zip(axes, found.items(), strict=False):
        axis.contour(side, side, mean, levels=14, cmap="viridis", linewidths=0.8, alpha=0.7)
        axis.plot(*front.T, color="C2", linewidth=5, solid_capstyle="round")
        ends = lines[:, -1]
        arrived = distance_to_front(ends) <= near
        for line, end, there in zip(lines, ends, arrived, strict=True):
            thin = line[:: max(1, len(line) // 1000)]
            axis.plot(*thin.T, color="C0" if there else "C3", linewidth=1.6)
            axis.plot(*line[0], "o", color="black", markersize=5)
            axis.plot(*end, "*" if there else "X", color="black", markersize=9, zorder=3)
        axis.set_title(f"{name}: {arrived.sum()} of {len(lines)}")
        axis.set_xlim(-11, 11)
        axis.set_ylim(-11, 11)
        axis.set_aspect("equal")
    for axis in axes[len(found) :]:
        axis.remove()
    picture.suptitle(
        "Paths from the starts (dots) over the mean loss; how many reach the Pareto set (green)"
    )
    return picture


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a point on a landscape of two losses with each of several weightings.

    Prints which starts reach the Pareto set and leaves a picture of the paths in OUT.
    """

    weightings: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"The weightings to show: any of {', '.join(KNOWN)}."),
    ] = (
        "equal",
        "adaptive",
        "famo",
        "pcgrad",
        "mgda",
        "cagrad",
        "nash_mtl",
        "imtl_g",
        "aligned_mtl",
        "upgrad",
        "conflict_free",
        "gradnorm",
    )
    first_scale: float = 1.0
    """Scale of the first loss: 1 in the paper of CAGrad, 0.1 in those of Nash-MTL and FAMO."""
    steps: int = 100_000
    """Number of steps; the default is that of the paper of CAGrad."""
    learning_rate: float = 1e-3
    """Learning rate of Adam; the default is that of all three papers."""
    near: float = 0.1
    """Distance to the Pareto set up to which a path has reached it."""
    out: pathlib.Path = pathlib.Path("runs/toy.png")
    """File for the picture."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after a message if the configuration is wrong."""
    config = tyro.cli(Config, prog="python -m experiments.toy", args=arguments)
    found, rows = {}, []
    try:
        if config.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {config.steps}.")
        optimizer = optax.adam(config.learning_rate)
        settings = RunSettings(WINDOW, max(1, config.steps // WINDOW), optimizer)
        made = {name: look_up(name, KNOWN, "weighting")(settings) for name in config.weightings}
        console = rich.console.Console(stderr=True)
        for name in rich.progress.track(made, "Training", console=console, transient=True):
            points = paths(
                made[name], optimizer, steps=config.steps, first_scale=config.first_scale
            )
            found[name] = np.asarray(points)
            distances = distance_to_front(found[name][:, -1])
            rows.append([name, *(f"{distance:.2f}" for distance in distances)])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Distance to the Pareto set after {config.steps} steps, from each start:\n")
    headers = ["weighting", *(f"({x:g}, {y:g})" for x, y in STARTS)]
    print(tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure(found, config.first_scale, config.near).savefig(config.out, dpi=120)
    print(f"\nPaths: {config.out}")


if __name__ == "__main__":
    main()
