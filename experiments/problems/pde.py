"""Physics-informed networks: the terms of a differential equation's loss are the tasks.

The network is the solution itself. Its tasks are the residual of the equation inside the domain
and each condition at the border; all are mean squares at points that are drawn anew at every step,
so there are no data. What counts is one number, the relative L2 error of the network on a grid,
against a solution that the training does not see. So only the task ``equation`` has a metric, the
error in the whole domain, border included; the others are trained for it. The change against equal
weights, the worst task and what tuning selects by are all of that one number.

No task says anything alone, and none is trained so: the residual without its border has any
solution, the border without the residual none.

Equations, networks and test grids are those of papers, named below. Where we deviate: a step has
128 points inside, as the code of Wang et al., and 32 on each side, where theirs has 128; the
learning rate falls by a cosine, theirs by a tenth every 1,000 steps; there are a fifth of the
papers' steps, at a higher learning rate, so that published errors are not comparable.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtl_jax.compare import Problem, Task, relative_l2

Points = Float[Array, "points 2"]
Values = Float[Array, "points"]
Solution = Callable[[np.ndarray], np.ndarray]
"""The values at the rows of an array of points, in float64."""
Field = Callable[[Points], Values]
"""A function of points, each value of the point in its row alone."""
Params = list[dict[str, Array]]

VALIDATION_POINTS = 2_000
VISCOSITY = 0.01 / np.pi


class Term(NamedTuple):
    """A task: something that is to be 0.

    Attributes:
      residual: ``residual(u, points) -> values``.
      side: the number of a coordinate and the value that it has at all points of the task; ``None``
        for points of the whole domain.
    """

    residual: Callable[[Field, Points], Values]
    side: tuple[int, float] | None = None


def burgers() -> Problem:
    r"""Burgers' equation with a small viscosity: a wave that becomes a shock.

    .. math:: u_t + u u_x = \frac{0.01}{\pi} u_{xx}, \quad u(0, x) = -\sin(\pi x),
       \quad u(t, \pm 1) = 0

    for :math:`0 \le t \le 1` and :math:`-1 \le x \le 1`; the points are :math:`(t, x)`. As in the
    papers of ReLoBRaLo, ConFIG and DCGD. Network and test grid are ConFIG's, 5 hidden layers of 50
    units and 100 x 256 points; its code has one task for both sides, and 30,000 steps.

    Returns:
      The problem, with the tasks ``equation``, ``initial``, ``x = -1`` and ``x = 1``.

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021

      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, 2024

      Hwang and Lim, `Dual Cone Gradient Descent for Training Physics-Informed Neural Networks
      <https://arxiv.org/abs/2409.18426>`_, 2024
    """

    def equation(u: Field, z: Points) -> Values:
        _, u_t, _ = derivatives(u, z, 0)
        value, u_x, u_xx = derivatives(u, z, 1)
        return u_t + value * u_x - VISCOSITY * u_xx

    edge = (np.arange(256) + 0.5) / 256  # the middles of 256 cells, as ConFIG's
    return _problem(
        name="burgers",
        description="Burgers' equation, solved by a network: its residual and its border.",
        terms={
            "equation": Term(equation),
            "initial": Term(lambda u, z: u(z) + jnp.sin(np.pi * z[:, 1]), (0, 0.0)),
            "x = -1": Term(_value, (1, -1.0)),
            "x = 1": Term(_value, (1, 1.0)),
        },
        domain=((0.0, 1.0), (-1.0, 1.0)),
        solution=burgers_solution,
        grid=(np.linspace(0, 1, 100), 2 * edge - 1),
        hidden=(50,) * 5,
        learning_rate=5e-3,
        epochs=60,
    )


def helmholtz() -> Problem:
    r"""The Helmholtz equation on a square, with a wave that is short in one direction.

    .. math:: u_{xx} + u_{yy} + u = (1 - a_1^2 \pi^2 - a_2^2 \pi^2)\, u^*, \quad
       u^*(x, y) = \sin(a_1 \pi x) \sin(a_2 \pi y), \quad a_1 = 1, \quad a_2 = 4

    for :math:`-1 \le x, y \le 1`, and 0 on all four sides; the solution is :math:`u^*`. As in the
    paper on learning rate annealing, with its network, 3 hidden layers of 50 units, and its test
    grid, 100 x 100 points; and as in those of ReLoBRaLo and DCGD. The first has one task for all
    sides, here each is one, as in ReLoBRaLo's code; and 40,000 steps.

    Returns:
      The problem, with the tasks ``equation``, ``x = -1``, ``x = 1``, ``y = -1`` and ``y = 1``.

    References:
      Wang et al., `Understanding and Mitigating Gradient Pathologies in Physics-Informed Neural
      Networks <https://arxiv.org/abs/2001.04536>`_, 2020

      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021

      Hwang and Lim, `Dual Cone Gradient Descent for Training Physics-Informed Neural Networks
      <https://arxiv.org/abs/2409.18426>`_, 2024
    """
    return _helmholtz("helmholtz", (1, 4), hidden=(50,) * 3, learning_rate=1e-2, epochs=80)


def helmholtz_small() -> Problem:
    r"""The Helmholtz equation with a longer wave, which a small network learns in seconds.

    That of :func:`helmholtz` with :math:`a_2 = 2`, 2 hidden layers of 32 units, half the points and
    a quarter of the steps. It is in none of the papers.

    Returns:
      The problem, with the same tasks.
    """
    small = {"hidden": (32,) * 2, "points": 64}
    return _helmholtz("helmholtz_small", (1, 2), learning_rate=3e-2, epochs=20, **small)


def _helmholtz(name: str, waves: tuple[int, int], **settings: Any) -> Problem:
    """The Helmholtz equation with so many half waves in each half of the two directions."""
    a1, a2 = waves
    factor = 1 - (a1 * np.pi) ** 2 - (a2 * np.pi) ** 2

    def solution(z: Any) -> Any:
        sin = jnp.sin if isinstance(z, jax.Array) else np.sin
        return sin(a1 * np.pi * z[:, 0]) * sin(a2 * np.pi * z[:, 1])

    def equation(u: Field, z: Points) -> Values:
        value, _, u_xx = derivatives(u, z, 0)
        _, _, u_yy = derivatives(u, z, 1)
        return u_xx + u_yy + value - factor * solution(z)

    line = np.linspace(-1, 1, 100)
    return _problem(
        name=name,
        description="The Helmholtz equation, solved by a network: its residual and four sides.",
        terms={
            "equation": Term(equation),
            "x = -1": Term(_value, (0, -1.0)),
            "x = 1": Term(_value, (0, 1.0)),
            "y = -1": Term(_value, (1, -1.0)),
            "y = 1": Term(_value, (1, 1.0)),
        },
        domain=((-1.0, 1.0), (-1.0, 1.0)),
        solution=solution,
        grid=(line, line),
        **settings,
    )


def klein_gordon() -> Problem:
    r"""The Klein-Gordon equation with a cubic term: an oscillation that is given at the start.

    .. math:: u_{tt} - u_{xx} + u^3 = f, \quad u(0, x) = x, \quad u_t(0, x) = 0

    for :math:`0 \le t, x \le 1`; the points are :math:`(t, x)`. The solution is
    :math:`u^*(t, x) = x \cos(5 \pi t) + (t x)^3`, from which f and the values at x = 0 and x = 1
    follow. As in the paper on learning rate annealing, with its network, 5 hidden layers of 50
    units, and its test grid, 100 x 100 points. There both initial conditions are one task and both
    sides another; and there are 40,000 steps.

    Returns:
      The problem, with the tasks ``equation``, ``initial``, ``velocity``, ``x = 0`` and ``x = 1``.

    References:
      Wang et al., `Understanding and Mitigating Gradient Pathologies in Physics-Informed Neural
      Networks <https://arxiv.org/abs/2001.04536>`_, 2020
    """

    def solution(z: Any) -> Any:
        cos, (t, x) = jnp.cos if isinstance(z, jax.Array) else np.cos, z.T
        return x * cos(5 * np.pi * t) + (t * x) ** 3

    def equation(u: Field, z: Points) -> Values:
        value, _, u_tt = derivatives(u, z, 0)
        _, _, u_xx = derivatives(u, z, 1)
        t, x = z.T
        wave = -((5 * np.pi) ** 2) * x * jnp.cos(5 * np.pi * t)
        source = wave + 6 * t * x**3 - 6 * x * t**3 + solution(z) ** 3
        return u_tt - u_xx + value**3 - source

    def error(u: Field, z: Points) -> Values:
        return u(z) - solution(z)

    line = np.linspace(0, 1, 100)
    return _problem(
        name="klein_gordon",
        description="The Klein-Gordon equation, solved by a network: residual, start and sides.",
        terms={
            "equation": Term(equation),
            "initial": Term(error, (0, 0.0)),
            "velocity": Term(lambda u, z: derivatives(u, z, 0)[1], (0, 0.0)),
            "x = 0": Term(error, (1, 0.0)),
            "x = 1": Term(error, (1, 1.0)),
        },
        domain=((0.0, 1.0), (0.0, 1.0)),
        solution=solution,
        grid=(line, line),
        hidden=(50,) * 5,
        learning_rate=2e-3,
        epochs=60,
    )


def _value(u: Field, z: Points) -> Values:
    return u(z)


def _problem(
    *,
    name: str,
    description: str,
    terms: Mapping[str, Term],
    domain: Sequence[tuple[float, float]],
    solution: Solution,
    grid: Sequence[np.ndarray],
    hidden: Sequence[int],
    learning_rate: float,
    epochs: int,
    steps_per_epoch: int = 100,
    points: int = 128,
) -> Problem:
    """The problem of an equation.

    A batch is so many points inside the domain, and a quarter of that on each side. They are drawn
    from the key of the step, the same for all weightings; the training examples only say how many.
    The validation points are drawn at random, once; the test points are the grid. The learning rate
    is the best for equal weights on validation points, of those a factor of 3 apart, or less.
    """
    low, high = jnp.array(domain).T[:, None]
    # Mean 0 and deviation 1 of points drawn from the domain, as in the code of Wang et al.
    middle, deviation = (low + high) / 2, (high - low) / 12**0.5
    widths = (2, *hidden, 1)

    def field(params: Params, z: Points) -> Values:
        z = (z - middle) / deviation
        for layer in params[:-1]:
            z = jnp.tanh(z @ layer["w"] + layer["b"])
        return (z @ params[-1]["w"] + params[-1]["b"])[:, 0]

    def init(key: Array) -> tuple[Params, dict[str, Array]]:
        initial = jax.nn.initializers.glorot_normal()
        keys = jax.random.split(key, len(widths) - 1)
        shapes = list(itertools.pairwise(widths))
        return [
            {"w": initial(key, shape), "b": jnp.zeros((1, shape[1]))}
            for key, shape in zip(keys, shapes, strict=True)
        ], {}

    def losses(
        params: Params, model_state: dict[str, Array], key: Array, batch: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        u, number = functools.partial(field, params), len(batch["point"])
        sizes = [number if term.side is None else max(1, number // 4) for term in terms.values()]
        drawn = low + (high - low) * jax.random.uniform(key, (sum(sizes), 2))
        parts = jnp.split(drawn, np.cumsum(sizes)[:-1])
        found = {}
        for z, (task, term) in zip(parts, terms.items(), strict=True):
            if term.side is not None:
                z = z.at[:, term.side[0]].set(term.side[1])
            found[task] = jnp.mean(term.residual(u, z) ** 2)
        return found, model_state

    def examples(z: np.ndarray) -> dict[str, np.ndarray]:
        return {"point": z.astype(np.float32), "solution": solution(z).astype(np.float32)}

    bounds = np.array(domain).T
    drawn = np.random.default_rng(0).uniform(bounds[0], bounds[1], (VALIDATION_POINTS, 2))
    return Problem(
        name=name,
        description=description,
        tasks={
            task: Task(relative_l2(), label="solution") if task == "equation" else Task(())
            for task in terms
        },
        train={"point": np.arange(steps_per_epoch * points, dtype=np.int32)},
        validation=examples(drawn),
        test=examples(np.stack(np.meshgrid(*grid, indexing="ij"), axis=-1).reshape(-1, 2)),
        init=init,
        losses=losses,
        predict=lambda params, model_state, batch: {"equation": field(params, batch["point"])},
        optimizer=lambda learning_rate, num_steps: optax.adam(
            optax.cosine_decay_schedule(learning_rate, num_steps)
        ),
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=points,
        alone=False,
    )


def derivatives(u: Field, z: Points, axis: int) -> tuple[Values, Values, Values]:
    """The function at the points, and its first and second derivative by a coordinate.

    By forward mode twice, all points at once: XLA computes what the two have in common once.
    """
    direction = jnp.zeros_like(z).at[:, axis].set(1)

    def along(z: Points) -> tuple[Values, Values]:
        return jax.jvp(u, (z,), (direction,))

    (value, first), (_, second) = jax.jvp(along, (z,), (direction,))
    return value, first, second


def burgers_solution(z: np.ndarray, nodes: int = 100) -> np.ndarray:
    r"""The solution of Burgers' equation, by the transformation of Cole and Hopf.

    .. math:: u(t, x) = -\frac{\int \sin(\pi (x - \eta)) f(x - \eta) e^{-\eta^2 / 4 \nu t} d\eta}
       {\int f(x - \eta) e^{-\eta^2 / 4 \nu t} d\eta}, \quad
       f(y) = \exp\left(-\frac{\cos(\pi y)}{2 \pi \nu}\right)

    Args:
      z: the points (t, x).
      nodes: of the Gauss-Hermite quadrature.

    Returns:
      The values, to 1e-6 and better with the default.

    References:
      Basdevant et al., `Spectral and finite difference solutions of the Burgers equation
      <https://doi.org/10.1016/0045-7930(86)90036-8>`_, 1986
    """
    roots, weights = np.polynomial.hermite.hermgauss(nodes)
    t, x = z.T[..., None]
    y = x - 2 * np.sqrt(VISCOSITY * t) * roots
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    # f spans e^100, so that no node is left out for its weight alone.
    mass = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(mass * np.sin(np.pi * y)).sum(axis=1) / mass.sum(axis=1)
