"""The records of the methods say what is true of them."""

import dataclasses
import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import METHODS, Method, RunSettings, Signal
from mtl_jax._search_space import Choice, TaskWeights

SETTINGS = RunSettings(steps_per_epoch=2, epochs=5, optimizer=optax.sgd(0.01))
SIGNALS = {
    "the losses": Signal.LOSSES,
    "the losses after the step, too": Signal.LOSSES,
    "the Gramian": Signal.GRAMIAN,
    "the task gradients": Signal.TASK_GRADIENTS,
    "a second batch": Signal.SECOND_BATCH,
}
FOLDERS = {
    "loss_weightings": {"the losses", "the losses after the step, too"},
    "gramian_weightings": {"the Gramian"},
    "gradient_weightings": {"the task gradients"},
    "gradient_aggregators": {"the task gradients"},
    "second_batch_weightings": {"a second batch"},
}
KEY = jax.random.key(3)
ROWS = jnp.array([[1.0, 0.5, 0.0], [-0.25, 1.0, 0.5], [0.5, -0.25, 2.0]])
LOSSES = jnp.array([1.0, 2.0, 3.0])
each_method = pytest.mark.parametrize("name", METHODS)


def make(name, **own):
    given = {"weights": (0.5, 1.0, 1.5)} if name == "constant" else {}
    return METHODS[name].make(SETTINGS, **(given | own))


@functools.cache
def step(name):
    """The compiled update on three tasks, and the state before the first step."""
    made = make(name)
    shapes = (np.float32(0),) * 3

    if isinstance(made, mtl_jax.Aggregator):

        def update(losses, rows, state):
            return made.update(rows, state, losses=tuple(jnp.unstack(losses)))

        return jax.jit(update), made.init(ROWS[0], shapes, key=KEY)

    def update(losses, rows, state):
        signals = {"gramian": rows @ rows.T, "task_gradients": rows}
        if made.needs is Signal.SECOND_BATCH:  # with the same gradients
            combinations, _ = made.method.directions(state, jnp.ones(3, bool))
            signals = {"products": rows @ (combinations @ rows).T}
        weights, state = made.update(tuple(jnp.unstack(losses)), state, **signals)
        return jnp.stack(weights), state

    return jax.jit(update), made.init(shapes, key=KEY, params=ROWS[0])


def run(name, *, first=LOSSES, later=LOSSES, rows=ROWS, steps=4):
    """The weights, or an aggregator's gradient, at every step."""
    update, state = step(name)
    found = []
    for number in range(steps):
        result, state = update(later if number else first, rows, state)
        found.append(np.asarray(result))
    return found


def test_every_method_has_a_record_and_its_file_the_folder_of_what_it_reads():
    package = pathlib.Path(mtl_jax.__file__).parent
    found = {
        (folder, path.stem) for folder in FOLDERS for path in (package / folder).glob("[a-z]*.py")
    }
    recorded = set()
    for name, method in METHODS.items():
        assert name == method.name == method.factory.__name__
        assert getattr(mtl_jax, name) is method.factory
        *_, folder, module = method.factory.__module__.split(".")
        assert module == name
        assert method.reads in FOLDERS[folder]
        recorded.add((folder, name))
    assert recorded == found


@each_method
def test_what_it_reads(name):
    method, made = METHODS[name], make(name)
    aggregates = isinstance(made, mtl_jax.Aggregator)
    assert aggregates == (method.total is None)
    needs = Signal.TASK_GRADIENTS if aggregates else made.needs
    assert needs is SIGNALS[method.reads]
    observes = not aggregates and made.observe is not None
    assert observes == (method.reads == "the losses after the step, too")


@each_method
def test_a_comparison_sets_what_has_no_default(name):
    method = METHODS[name]
    parameters = inspect.signature(method.factory).parameters
    without = {key for key, one in parameters.items() if one.default is inspect.Parameter.empty}
    assert without - set(method.required) == ({"weights"} if name == "constant" else set())
    assert set(method.required) <= set(parameters)
    assert set(method.search) <= set(parameters)
    assert method.call == f"{name}({', '.join(key for key in parameters if key in without)})"
    for own in method.variants.values():
        assert set(own) <= set(parameters)
        make(name, **own)


@each_method
def test_domain(name):
    domain, answers = METHODS[name].domain, {}
    for what, least in (("positive", 1.0), ("not negative", 0.0), ("any", -1.0)):
        losses = LOSSES.at[0].set(least)
        answers[what] = all(
            np.all(np.isfinite(one)) for one in run(name, first=losses, later=losses)
        )
    kinds = ("positive", "not negative", "any")
    assert answers == {kind: kinds.index(kind) <= kinds.index(domain) for kind in kinds}


@each_method
def test_total(name):
    total = METHODS[name].total
    if total in ("K", "1"):
        for weights in run(name, later=LOSSES * jnp.array([0.9, 0.5, 1.2])):
            np.testing.assert_allclose(weights.sum(), 3 if total == "K" else 1, rtol=1e-5)


@each_method
def test_degree(name):
    """A power of two rounds nothing; the draws are the same."""
    degree = METHODS[name].degree
    assert (degree is None) == (METHODS[name].reads != "the Gramian" or name == "gradnorm")
    if degree is not None:
        scaled = [run(name, rows=ROWS * scale) for scale in (1.0, 2.0**10)]
        for plain, large in zip(*scaled, strict=True):
            np.testing.assert_allclose(large, plain * 2.0 ** (10 * degree), rtol=1e-5, atol=1e-6)


@each_method
def test_non_conflicting(name):
    """As the record says; where it says nothing, some loss rises for some of the gradients."""
    non_conflicting = METHODS[name].non_conflicting
    if METHODS[name].total is None or METHODS[name].reads != "the Gramian":
        assert non_conflicting is False
        return
    rng = np.random.default_rng(0)
    least = []
    for sign in [-1, 1] * 20:  # in conflict, and alike
        rows = rng.normal(size=(3, 3)) * 10 ** rng.uniform(-1, 1, (3, 1))
        rows[1:] += sign * 0.8 * rows[0]
        (weights,) = run(name, rows=jnp.asarray(rows, jnp.float32), steps=1)
        gains = rows @ (weights @ rows)
        least.append(
            np.min(gains / (np.linalg.norm(rows, axis=1) * np.linalg.norm(weights @ rows)))
        )
    if non_conflicting:
        assert min(least) >= -1e-4
    else:
        assert min(least) < -1e-2


@each_method
def test_draws_and_least_tasks(name):
    method, made = METHODS[name], make(name)

    def init(number, key=KEY):
        losses = (np.float32(0),) * number
        if isinstance(made, mtl_jax.Aggregator):
            return made.init(ROWS[0], losses, key=key)
        return made.init(losses, key=key, params=ROWS[0])

    if method.draws:
        with pytest.raises(ValueError, match="key"):
            init(3, key=None)
    else:
        init(3, key=None)
    if name == "constant":  # whose weights are those of three tasks
        return
    init(method.least_tasks)
    if method.least_tasks > 1:
        with pytest.raises(ValueError, match="task"):
            init(method.least_tasks - 1)


@each_method
def test_sources_are_those_of_the_docstring(name):
    method = METHODS[name]
    text = inspect.getdoc(method.factory)
    assert all(address in text for _, address in method.sources)
    assert bool(method.sources) == ("References:" in text)
    assert bool(method.sources) == (name != "adaptive")


@each_method
def test_what_tuning_searches_begins_at_what_the_method_is_without_it(name):
    method = METHODS[name]
    parameters = inspect.signature(method.factory).parameters
    for key, dimension in method.search.items():
        if isinstance(dimension, TaskWeights):
            continue
        first = dimension.first(key, [])[key]
        required = method.required.get(key)
        assert first == (parameters[key].default if required is None else required(SETTINGS))
        values = (
            dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        )
        for value in values:
            make(name, **{key: value})


@each_method
def test_what_a_variant_sets_is_not_searched(name):
    method = METHODS[name]
    assert list(method.spaces) == [name, *method.variants]
    assert method.spaces[name] == method.search
    for variant, own in method.variants.items():
        kept = {key: one for key, one in method.search.items() if key not in own}
        assert method.spaces[variant] == kept


def test_own_arguments_go_before_those_of_the_run():
    seen = {}

    def factory(window, size=1):
        seen.update(window=window, size=size)
        return mtl_jax.equal()

    method = Method(
        factory=factory,
        reads="the losses",
        effect="nothing",
        required={"window": lambda settings: settings.steps_per_epoch},
        total="K",
    )
    method.make(SETTINGS, size=3)
    assert seen == {"window": 2, "size": 3}
    method.make(SETTINGS, window=7)
    assert seen == {"window": 7, "size": 1}
    assert method.call == "factory(window)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.total = "1"
    with pytest.raises(TypeError, match="weights"):
        METHODS["constant"].make(SETTINGS)
