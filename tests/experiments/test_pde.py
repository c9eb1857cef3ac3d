"""The equations against finite differences and a spectral solver, and what a run makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from experiments.problems import build_problem, pde

NAMES = ("burgers", "helmholtz", "helmholtz_small", "klein_gordon")


@pytest.fixture(scope="module")
def problems():
    return {name: build_problem(name) for name in NAMES}


def test_burgers_solution_is_that_of_a_spectral_method():
    """Fourier modes with Runge and Kutta's method, the viscous term integrated exactly."""
    number, steps, nu = 1024, 2000, pde.VISCOSITY
    x = -1 + 2 * np.arange(number) / number
    k, h = np.pi * np.fft.rfftfreq(number, 1 / number), 1 / steps
    full, half = np.exp(-nu * k**2 * h), np.exp(-nu * k**2 * h / 2)

    def slope(v):
        return -0.5j * k * np.fft.rfft(np.fft.irfft(v) ** 2)

    v = np.fft.rfft(-np.sin(np.pi * x))
    for step in range(1, steps + 1):
        a = slope(v)
        b = slope(half * (v + h / 2 * a))
        c = slope(half * v + h / 2 * b)
        d = slope(full * v + h * half * c)
        v = full * v + h / 6 * (full * a + 2 * half * (b + c) + d)
        if step in (200, 800, 2000):
            z = np.stack([np.full(number, step * h), x], axis=1)
            assert np.abs(pde.burgers_solution(z) - np.fft.irfft(v)).max() < 1e-6
    start = np.stack([np.zeros(number), x], axis=1)
    np.testing.assert_allclose(pde.burgers_solution(start), -np.sin(np.pi * x), atol=1e-12)


SOLUTIONS = {  # once more, as the papers have them
    "burgers": pde.burgers_solution,
    "helmholtz": lambda z: np.sin(np.pi * z[:, 0]) * np.sin(4 * np.pi * z[:, 1]),
    "helmholtz_small": lambda z: np.sin(np.pi * z[:, 0]) * np.sin(2 * np.pi * z[:, 1]),
    "klein_gordon": lambda z: z[:, 1] * np.cos(5 * np.pi * z[:, 0]) + (z[:, 0] * z[:, 1]) ** 3,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_has_the_solution_and_validation_points_are_others(problems, name):
    problem = problems[name]
    test, validation = problem.test, problem.validation
    for split in (test, validation):
        expected = SOLUTIONS[name](split["point"].astype(np.float64))
        np.testing.assert_allclose(split["solution"], expected, atol=2e-4)  # of rounded points
    assert len(test["point"]) == (25_600 if name == "burgers" else 10_000)
    everywhere = np.concatenate([test["point"], validation["point"]])
    assert len(np.unique(everywhere, axis=0)) == len(everywhere)
    again = build_problem(name)
    assert again.digest() == problem.digest()


def slow_losses(name, params, key, points):
    """Every term in float64, with differences for derivatives, at the points of the step."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    low, high = {"helmholtz_small": (-1, 1), "klein_gordon": (0, 1), "burgers": ((0, -1), (1, 1))}[
        name
    ]
    low, high = np.broadcast_to(low, 2), np.broadcast_to(high, 2)

    def u(z):
        z = (z - (low + high) / 2) / ((high - low) / np.sqrt(12))
        for layer in params[:-1]:
            z = np.tanh(z @ layer["w"] + layer["b"])
        return (z @ params[-1]["w"] + params[-1]["b"])[:, 0]

    def by(axis, z, order, h=1e-4):
        e = h * np.eye(2)[axis]
        if order == 1:
            return (u(z + e) - u(z - e)) / (2 * h)
        return (u(z + e) - 2 * u(z) + u(z - e)) / h**2

    def side(axis, value):
        def put(z):
            z = z.copy()
            z[:, axis] = value
            return z

        return put

    exact, pi = SOLUTIONS[name], np.pi
    if name == "burgers":
        terms = {
            "equation": lambda z: by(0, z, 1) + u(z) * by(1, z, 1) - 0.01 / pi * by(1, z, 2),
            "initial": lambda z: (u(z) + np.sin(pi * z[:, 1]), side(0, 0)),
            "x = -1": lambda z: (u(z), side(1, -1)),
            "x = 1": lambda z: (u(z), side(1, 1)),
        }
    elif name == "helmholtz_small":
        terms = {
            "equation": lambda z: by(0, z, 2) + by(1, z, 2) + u(z) - (1 - 5 * pi**2) * exact(z),
            "x = -1": lambda z: (u(z), side(0, -1)),
            "x = 1": lambda z: (u(z), side(0, 1)),
            "y = -1": lambda z: (u(z), side(1, -1)),
            "y = 1": lambda z: (u(z), side(1, 1)),
        }
    else:

        def source(z, h=1e-3):  # from the solution itself, by differences of fourth order
            found = exact(z) ** 3
            for axis, sign in ((0, 1), (1, -1)):
                e = h * np.eye(2)[axis]
                near = 16 * (exact(z + e) + exact(z - e)) - exact(z + 2 * e) - exact(z - 2 * e)
                found = found + sign * (near - 30 * exact(z)) / (12 * h**2)
            return found

        terms = {
            "equation": lambda z: by(0, z, 2) - by(1, z, 2) + u(z) ** 3 - source(z),
            "initial": lambda z: (u(z) - z[:, 1], side(0, 0)),
            "velocity": lambda z: (by(0, z, 1), side(0, 0)),
            "x = 0": lambda z: (u(z), side(1, 0)),
            "x = 1": lambda z: (u(z) - np.cos(5 * pi * z[:, 0]) - z[:, 0] ** 3, side(1, 1)),
        }
    sizes = [points] + [points // 4] * (len(terms) - 1)
    drawn = np.asarray(jax.random.uniform(key, (sum(sizes), 2)), np.float64) * (high - low) + low
    found = {}
    for z, (task, term) in zip(np.split(drawn, np.cumsum(sizes)[:-1]), terms.items(), strict=True):
        if task == "equation":
            values = term(z)
        else:
            values, _ = term(term(z)[1](z))
        found[task] = np.mean(values**2)
    return found


# Without the short wave, to which 200 steps do nothing.
@pytest.mark.parametrize("name", ["burgers", "helmholtz_small", "klein_gordon"])
def test_losses_are_those_of_the_equation_at_new_points_and_fall(problems, name):
    problem, points, steps = problems[name], 64, 200
    batch = {"point": jnp.arange(points)}
    params, model_state = problem.init(jax.random.key(1))
    assert model_state == {}
    optimizer = problem.optimizer(1e-2, steps)

    def total(params, key):
        losses, _ = problem.losses(params, model_state, key, batch)
        return sum(losses.values()), losses

    @jax.jit
    def train(params):
        def step(carry, key):
            (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(carry[0], key)
            updates, state = optimizer.update(gradient, carry[1])
            return (optax.apply_updates(carry[0], updates), state), losses

        keys = jax.random.split(jax.random.key(2), steps)
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        return params, losses, keys

    trained, losses, keys = train(params)
    expected = slow_losses(name, params, keys[0], points)
    assert list(expected) == list(problem.tasks)
    for task, value in expected.items():
        np.testing.assert_allclose(losses[task][0], value, rtol=1e-3)
    sums = np.sum([losses[task] for task in expected], axis=0)
    assert sums[-20:].mean() < 0.7 * sums[:5].mean()
    # With the same parameters another key has other points.
    again = problem.losses(params, model_state, keys[1], batch)[0]["equation"]
    assert abs(again / losses["equation"][0] - 1) > 1e-3
    outputs = problem.predict(trained, model_state, problem.validation)
    assert set(outputs) == {"equation"}
    (metric,) = problem.tasks["equation"].metrics
    label = problem.labels(problem.validation)["equation"]
    found = metric.over([(metric.statistics(outputs["equation"], label, label == label), None)])
    error = np.linalg.norm(outputs["equation"] - label) / np.linalg.norm(label)
    np.testing.assert_allclose(found, error, rtol=1e-5)


def test_derivatives_of_a_polynomial():
    z = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    value, first, second = pde.derivatives(lambda z: z[:, 0] ** 3 * z[:, 1], z, 0)
    np.testing.assert_allclose(value, [2, -27])
    np.testing.assert_allclose(first, [6, -27])
    np.testing.assert_allclose(second, [12, -18])


@pytest.mark.parametrize("name", NAMES)
def test_the_equation_is_the_first_task(problems, name):
    """Of the order of the leaves, in which learning rate annealing has its reference."""
    problem = problems[name]
    assert sorted(problem.tasks)[0] == "equation"
    losses = dict.fromkeys(problem.tasks, 1.0)
    state = mtl_jax.lr_annealing(None).init(losses, params=jnp.zeros(2))
    assert state.inner.reference is None  # the first
    assert state.tasks.names[0] == "equation"
