"""Functions called outside `jit` are compiled once for a structure and dtype, for every method.

What compiles is counted: a loop that compiles anew at every call is slow, and nobody sees it.
"""

import contextlib

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
from aggregator_methods import METHODS as ROW_METHODS
from methods import EVERYBODY, KEY, TASKS

import mtl_jax
from mtl_jax import solvers

STEPS = 3
PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.ones((), np.float32)}


@pytest.fixture(scope="module")
def counted():
    """A context in which programs are counted; a list of their number."""
    number, active = [], []

    def listen(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            number[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def count():
        number.append(0)
        active.append(True)
        yield number
        active.pop()

    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def inputs(dtype, step):
    """Losses, Gramian and task gradients, new arrays and the same numbers at every call."""
    rng = np.random.default_rng(step)
    losses = {task: dtype(1 + k + 0.1 * step) for k, task in enumerate(TASKS)}
    rows = {name: rng.normal(size=(3, *leaf.shape)).astype(dtype) for name, leaf in PARAMS.items()}
    J = np.concatenate([leaf.reshape(3, -1) for leaf in rows.values()], axis=1)
    return losses, J @ J.T, rows


def programs(counted, run):
    """For each of two dtypes, the programs of the first call; those after it compile nothing.

    ``run(dtype)`` makes a function of the number of the call.
    """
    firsts = []
    for dtype in (np.float32, np.float64):
        call = run(dtype)
        with counted() as number:
            call(0)
        firsts.append(number[-1])
        with counted() as number:
            for step in range(1, STEPS):
                call(step)
        assert number[-1] == 0, dtype
    return firsts


ROW_WEIGHTINGS = [name for name in ROW_METHODS if methods.record(name).total is not None]


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.GRAMIAN_METHODS, *ROW_WEIGHTINGS])
@pytest.mark.usefixtures("x64")
def test_weightings(name, counted):
    weighting = methods.make(name)  # one that has compiled nothing

    def run(dtype):
        losses, _, _ = inputs(dtype, 0)
        states = [weighting.init(losses, key=KEY, params=PARAMS)]

        def update(step):
            losses, gramian, rows = inputs(dtype, step)
            weights, state = weighting.update(
                losses, states[-1], mask=EVERYBODY, gramian=gramian, task_gradients=rows
            )
            assert all(weight.dtype == dtype for weight in weights.values())
            states.append(state)

        return update

    assert programs(counted, run) == [1, 1]


@pytest.mark.usefixtures("x64")
def test_observe(counted):
    weighting = mtl_jax.famo()

    def run(dtype):
        losses, _, _ = inputs(dtype, 0)
        states = [weighting.init(losses)]

        def observe(step):
            losses, _, _ = inputs(dtype, step)
            states.append(weighting.observe(losses, states[-1], mask=EVERYBODY))

        return observe

    assert programs(counted, run) == [1, 1]


@pytest.mark.parametrize("name", [name for name in ROW_METHODS if name not in ROW_WEIGHTINGS])
@pytest.mark.usefixtures("x64")
def test_aggregators(name, counted):
    aggregator = methods.make(name)

    def run(dtype):
        losses, _, _ = inputs(dtype, 0)
        states = [aggregator.init(PARAMS, losses, key=KEY)]

        def update(step):
            losses, _, rows = inputs(dtype, step)
            _, state = aggregator.update(rows, states[-1], losses=losses, mask=EVERYBODY)
            states.append(state)

        return update

    assert programs(counted, run) == [1, 1]


@pytest.mark.usefixtures("x64")
def test_as_aggregator(counted):
    aggregator = mtl_jax.as_aggregator(mtl_jax.imtl_g(), 3)

    def run(dtype):
        states = [aggregator.init(jax.tree.map(dtype, PARAMS))]

        def update(step):
            losses, _, rows = inputs(dtype, step)
            states.append(aggregator.update(rows, states[-1], losses=losses, mask=EVERYBODY)[1])

        return update

    # The first of all calls compiles how a mask becomes a vector, too.
    assert programs(counted, run)[1] == 1


NUMBER = 9  # of tasks, which no other test has: the solvers' programs are not made here
SOLVERS = {
    "minimum_norm_point": lambda G: solvers.minimum_norm_point(G, np.ones(NUMBER, bool)),
    "dual_cone_projection": lambda G: solvers.dual_cone_projection(G, np.ones(NUMBER, G.dtype)),
    "maximin_in_ball": lambda G: solvers.maximin_in_ball(G, 0.5),
    "fair_point": lambda G: solvers.fair_point(G, 2.0),
    "diagnostics": mtl_jax.diagnostics,
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.usefixtures("x64")
def test_solvers_and_diagnostics(name, counted):
    def run(dtype):
        def solve(step):
            J = np.random.default_rng(step).normal(size=(NUMBER, 6)).astype(dtype)
            SOLVERS[name](J @ J.T)

        return solve

    assert programs(counted, run) == [1, 1]


@pytest.mark.usefixtures("x64")
def test_check_heads(counted):
    def heads(params, zs, x):
        return {task: jnp.sum(zs[task] * params[task] * x) for task in TASKS}

    def run(dtype):
        def checked(step):
            params = {task: np.full(3, 1 + step, dtype) for task in TASKS}
            z = np.full(3, 2 + step, dtype)
            mtl_jax.check_heads(heads, params, z, dtype(0.5), tasks=TASKS)

        return checked

    assert all(programs(counted, run))
