"""What is sent to another process, by cloudpickle as Ray, joblib and submitit do, works there."""

import functools
import os
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
from methods import EVERYBODY, KEY, TASKS

import mtl_jax

PARAMS = {"w": np.ones((2, 3), np.float32), "b": np.ones((), np.float32)}
LOSSES = {task: np.float32(1 + k) for k, task in enumerate(TASKS)}
RNG = np.random.default_rng(0)
ROWS = {name: RNG.normal(size=(3, *leaf.shape)).astype(np.float32) for name, leaf in PARAMS.items()}
J = np.concatenate([leaf.reshape(3, -1) for leaf in ROWS.values()], axis=1)
BATCH = RNG.normal(size=(8, 3)).astype(np.float32)


def sent(thing):
    return cloudpickle.loads(cloudpickle.dumps(thing))


def plain(tree):
    """The leaves in NumPy, keys as their data."""

    def value(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    return jax.tree.map(value, tree)


def assert_same(actual, expected):
    actual, expected = plain(actual), plain(expected)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def initial(method):
    if isinstance(method, mtl_jax.Aggregator):
        return method.init(PARAMS, LOSSES, key=KEY)
    return method.init(LOSSES, key=KEY, params=PARAMS)


def updated(method, state):
    """The weights, or the gradient, and the next state; and that after the step."""
    if isinstance(method, mtl_jax.Aggregator):
        return method.update(ROWS, state, losses=LOSSES, mask=EVERYBODY)
    signals = {"gramian": J @ J.T, "task_gradients": ROWS}
    if method.needs is mtl_jax.Signal.SECOND_BATCH:
        combinations, _ = method.method.directions(state, np.ones(3, bool))
        signals["products"] = J @ (np.asarray(combinations) @ J).T
    weights, state = method.update(LOSSES, state, mask=EVERYBODY, **signals)
    return weights, state if method.observe is None else method.observe(LOSSES, state)


WRAPPERS = {
    "every": lambda: mtl_jax.every(mtl_jax.mgda(), 2),
    "after_warmup": lambda: mtl_jax.after_warmup(mtl_jax.famo(), 1),
    "ema": lambda: mtl_jax.ema(mtl_jax.dwa(1), 0.5),
    "clipped": lambda: mtl_jax.clipped(mtl_jax.excess_mtl(), 0.2, 1.1),
    "normalized": lambda: mtl_jax.normalized(mtl_jax.pcgrad()),
    "with_preference": lambda: mtl_jax.with_preference(
        mtl_jax.random_weighting(), {"a": 1.0, "b": 2.0, "c": 0.5}
    ),
    "four of them": lambda: mtl_jax.normalized(
        mtl_jax.ema(mtl_jax.after_warmup(mtl_jax.every(mtl_jax.imtl_g(), 2), 1), 0.5)
    ),
}
MADE = {name: functools.partial(methods.made, name) for name in mtl_jax.METHODS} | WRAPPERS


@pytest.mark.parametrize("name", MADE)
def test_methods_and_wrappers_and_their_states(name):
    """Before they were used and after, when they hold what is compiled."""
    method = MADE[name]()
    state = initial(method)
    before = cloudpickle.dumps(method)
    expected = updated(method, state)
    assert_same(updated(cloudpickle.loads(before), sent(state)), expected)
    assert type(sent(method)) is type(method)


def encoder(params, x):
    return jnp.tanh(x @ params["encoder"])


def heads(params, zs, x):
    return {task: jnp.mean((zs[task] @ params[task] - 1) ** 2) for task in ("a", "b")}


def losses_fn(params, x):
    return heads(params, dict.fromkeys(("a", "b"), encoder(params, x)), x)


def params_():
    rng = np.random.default_rng(1)
    shapes = {"encoder": (3, 4), "a": (4,), "b": (4,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


at_representation = functools.partial(
    mtl_jax.representation_value_and_grad, encoder, heads, tasks=("a", "b")
)
GRADIENTS = {
    "value_and_grad": lambda: mtl_jax.value_and_grad(losses_fn, mtl_jax.famo()),
    "aggregator": lambda: mtl_jax.value_and_grad(
        losses_fn, mtl_jax.graddrop(), shared=lambda path: path == "encoder"
    ),
    "representation": lambda: at_representation(mtl_jax.every(mtl_jax.mgda(), 2)),
    "microbatched": lambda: mtl_jax.value_and_grad(
        mtl_jax.microbatched(losses_fn, 2), mtl_jax.uncertainty(optax.adam(0.1))
    ),
    "microbatched encoder": lambda: mtl_jax.representation_value_and_grad(
        mtl_jax.microbatched_encoder(encoder, 2), heads, mtl_jax.pcgrad(), tasks=("a", "b")
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_and_train_steps(name):
    gradient = GRADIENTS[name]()
    step = mtl_jax.make_train_step(gradient, optax.adam(0.1), donate=False)
    state = step.init(params_(), BATCH, weighting_key=KEY)
    expected = step(state, BATCH)
    assert_same(sent(step)(sent(state), BATCH), expected)
    again = mtl_jax.make_train_step(sent(gradient), optax.adam(0.1), donate=False)
    assert_same(again.init(params_(), BATCH, weighting_key=KEY), state)


def test_as_aggregator():
    aggregator = mtl_jax.as_aggregator(mtl_jax.imtl_g(), 3)
    state = aggregator.init(PARAMS)
    assert_same(sent(aggregator).update(ROWS, sent(state)), aggregator.update(ROWS, state))


IN_ANOTHER_PROCESS = """
import sys, cloudpickle
step, state, batch = cloudpickle.load(sys.stdin.buffer)
state, value = step(state, batch)
fresh = step.init(state.params, batch)  # made here, of the same tasks
step(fresh, batch)
assert step.update._cache_size() == 1
assert {state.weighting_state.tasks} == {fresh.weighting_state.tasks}
cloudpickle.dump((state, value), sys.stdout.buffer)
"""


def test_in_another_process():
    """One with another seed for hashes, to which a state comes with its tasks."""

    def losses_of(params, x):  # a local function: its code is sent, too
        z = jnp.tanh(x @ params["encoder"])
        return {task: jnp.mean((z @ params[task] - 1) ** 2) for task in ("a", "b")}

    gradient = mtl_jax.value_and_grad(losses_of, mtl_jax.ema(mtl_jax.adaptive(), 0.5))
    step = mtl_jax.make_train_step(gradient, optax.adam(0.1), donate=False)
    state, _ = step(step.init(params_(), BATCH), BATCH)
    ran = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS],
        input=cloudpickle.dumps((step, state, BATCH)),
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr.decode()
    found = cloudpickle.loads(ran.stdout)
    assert_same(found, step(state, BATCH))
    assert hash(found[0].weighting_state.tasks) == hash(state.weighting_state.tasks)
