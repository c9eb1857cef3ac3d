"""Every form of a training step: over the losses, at the representation, over the parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_problem import IN_PARTS, THREE_TARGETS, encoder, heads, losses, make_problem, shared, split

import mtl_jax
from mtl_jax._base import Aggregator, Signal
from mtl_jax.compare import WEIGHTINGS, named_weightings
from mtl_jax.compare.batches import orders, take
from mtl_jax.compare.referee import make_weightings
from mtl_jax.compare.training import Evaluator, Trainer

WHOLE = {"shared": shared}
FORMS = {"in parts": IN_PARTS, "whole": WHOLE}


@pytest.fixture(scope="module")
def three():
    """A problem with three tasks, an encoder and heads; its metrics; all known weightings."""
    problem = make_problem(THREE_TARGETS, **IN_PARTS, train=split(64, 0), epochs=2)
    return problem, Evaluator(problem), make_weightings(problem, WEIGHTINGS)


def last(trainer, seed=0):
    *_, run = trainer.run(seed)
    return run


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_known_weighting_trains(name, three):
    problem, evaluate, weightings = three
    run = last(Trainer(problem, evaluate, weightings[name], name))
    assert run.failure is None
    assert run.skipped == 0
    for task in problem.tasks:
        assert np.isfinite(run.test[task]).all()
        assert len(run.test[task]) == len(run.validation[task]) == problem.epochs
    total = [sum(run.train_losses[task][epoch] for task in problem.tasks) for epoch in (0, -1)]
    assert total[1] < total[0]
    if isinstance(weightings[name], Aggregator):
        assert run.measured_at == "parameters"
        assert run.weights == {}
    else:
        places = {Signal.GRAMIAN: "representation", Signal.TASK_GRADIENTS: "parameters"}
        assert run.measured_at == places.get(weightings[name].needs)
        assert list(run.weights) == list(problem.tasks)
        assert all(weights.shape == (4,) for weights in run.weights.values())
        assert all(np.isfinite(weights).all() for weights in run.weights.values())
    assert set(run.conflict) == ({"share", "cosine"} if run.measured_at else set())


def step_arguments(problem, seed=0):
    """What the first step of a run starts from, with all training examples as its batch."""
    init_key = jax.random.split(jax.random.key(seed), 4)[0]
    params, model_state = problem.init(init_key)
    return params, model_state, jax.random.key(1), jax.tree.map(jnp.asarray, problem.train)


def slow_rows(place, params, model_state, key, batch):
    """The task gradients in float64, a row a task, each by its own backward pass."""
    rows = []
    for task in params["heads"]:
        if place == "representation":
            z, _ = encoder(params, model_state, key, batch)

            def loss(z, task=task):
                return heads(params, dict.fromkeys(params["heads"], z), batch)[task]

            gradient = jax.grad(loss)(z)
        else:

            def loss(matrix, task=task):
                return losses(params | {"encoder": matrix}, model_state, key, batch)[0][task]

            gradient = jax.grad(loss)(params["encoder"])
        rows.append(np.ravel(gradient).astype(np.float64))
    return np.stack(rows)


@pytest.mark.parametrize(
    ("form", "place"), [("in parts", "representation"), ("whole", "parameters")]
)
def test_gramian_and_gradient_against_their_definitions(form, place):
    problem = make_problem(THREE_TARGETS, **FORMS[form])
    weighting = mtl_jax.upgrad()
    gradient_fn = Trainer(problem, Evaluator(problem), weighting, "upgrad").gradient()
    params, *arguments = step_arguments(problem)
    state = gradient_fn.init(params, *arguments)
    value, gradient, _ = jax.jit(gradient_fn)(params, state, *arguments)
    rows = slow_rows(place, params, *arguments)
    order = [list(params["heads"]).index(task) for task in sorted(problem.tasks)]  # the leaves'
    np.testing.assert_allclose(value.gramian, (rows @ rows.T)[np.ix_(order, order)], rtol=1e-4)

    def weighted(params):
        found, _ = losses(params, *arguments)
        return sum(value.weights[task] * found[task] for task in problem.tasks)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        jax.grad(weighted)(params),
    )


def test_an_aggregator_works_on_the_shared_parameters():
    problem = make_problem(THREE_TARGETS, **IN_PARTS)
    aggregator = mtl_jax.trimmed_mean(1)
    gradient_fn = Trainer(problem, Evaluator(problem), aggregator, "median").gradient()
    params, *arguments = step_arguments(problem)
    state = gradient_fn.init(params, *arguments)
    value, gradient, _ = jax.jit(gradient_fn)(params, state, *arguments)
    assert value.weights is None
    median = np.median(slow_rows("parameters", params, *arguments), axis=0)
    np.testing.assert_allclose(np.ravel(gradient["encoder"]), median, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("form", "place", "name"),
    [
        ("in parts", "representation", "adaptive"),
        ("whole", "parameters", "adaptive"),
        ("in parts", "parameters", "excess_mtl"),
    ],
)
def test_conflicts_of_a_step_against_their_definition(form, place, name):
    train = split(40, 3)
    problem = make_problem(THREE_TARGETS, **FORMS[form], train=train, batch_size=40, epochs=1)
    weighting = make_weightings(problem, named_weightings([name]))[name]
    run = last(Trainer(problem, Evaluator(problem), weighting, name, conflict=True), seed=5)
    rows = slow_rows(place, *step_arguments(problem, seed=5))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = (rows @ rows.T)[np.triu_indices(3, 1)]
    assert run.measured_at == place
    np.testing.assert_allclose(run.conflict["cosine"], [np.mean(cosines)], rtol=1e-4)
    np.testing.assert_allclose(run.conflict["share"], [np.mean(cosines < 0)], rtol=1e-6)


@pytest.mark.parametrize(("form", "name"), [(f, n) for f in FORMS for n in ("mgda", "excess_mtl")])
def test_missing_labels_and_one_task_alone(form, name):
    """A task without labels is as one that is not there; a task alone is the only one there."""

    def labelled(batch):
        return {task: jnp.isfinite(batch[task]) for task in ("line", "square")}

    train = split(64, 0)
    train["square"][:] = np.nan
    problem = make_problem(**FORMS[form], train=train, labelled=labelled, epochs=1)
    weighting = make_weightings(problem, named_weightings([name]))[name]
    evaluate = Evaluator(problem)
    masked = last(Trainer(problem, evaluate, weighting, name))
    alone = last(Trainer(problem, evaluate, weighting, name, ["line"]))
    np.testing.assert_allclose(masked.test["line"], alone.test["line"], rtol=1e-5)
    assert np.isfinite(alone.test["line"]).all()
    assert list(alone.test) == ["line"]
    for run in (masked, alone):
        assert run.skipped == 0
        assert np.isnan(run.conflict["share"]).all()  # there is no pair
        assert np.isnan(run.conflict["cosine"]).all()
    if name == "mgda":
        np.testing.assert_array_equal(masked.weights["square"], np.nan)
        np.testing.assert_allclose(alone.weights["line"], 1, rtol=1e-6)
    assert np.isnan(masked.train_losses["square"]).all()


def test_a_batch_with_one_task_only_has_no_conflict():
    train = split(64, 0)
    train["square"][: 64 - 16] = np.nan

    def labelled(batch):
        return {task: jnp.isfinite(batch[task]) for task in ("line", "square")}

    problem = make_problem(**IN_PARTS, train=train, labelled=labelled, batch_size=4, epochs=1)
    run = last(Trainer(problem, Evaluator(problem), mtl_jax.pcgrad(), "pcgrad"))
    both = np.isfinite(run.weights["square"])  # in the others it is not there
    assert 0 < both.sum() < 16
    for values in run.conflict.values():
        np.testing.assert_array_equal(np.isfinite(values), both)


def test_steps_that_are_not_measured():
    problem = make_problem(**IN_PARTS, epochs=1)
    sometimes = mtl_jax.every(mtl_jax.mgda(), 4)
    run = last(Trainer(problem, Evaluator(problem), sometimes, "sometimes"))
    for values in run.conflict.values():
        np.testing.assert_array_equal(np.isfinite(values), [True, False, False, False, True, False])


def test_the_state_of_the_encoder_is_carried():
    def scores(params, model_state, batch):
        calls = jnp.full(len(batch["x"]), model_state["calls"], jnp.float32)
        return dict.fromkeys(("line", "square"), calls)

    problem = make_problem(**IN_PARTS, scores=scores)
    run = last(Trainer(problem, Evaluator(problem), mtl_jax.mgda(), "mgda"))
    assert run.test["line"] == [6, 12, 18]


def test_the_second_batch_is_that_of_the_next_step():
    """Its products are those of the order in which the epoch goes through the data."""
    problem = make_problem(**WHOLE, epochs=1, batch_size=64)

    def directions(state, present):
        return jnp.array([[1.0, 0.0]]), None

    weighting = mtl_jax.vector_weighting(
        lambda losses, state, present, steps, products: (products[:, 0], state),
        needs=Signal.SECOND_BATCH,
        directions=directions,
    )
    problem = dataclasses.replace(problem, optimizer=lambda rate, steps: optax.set_to_zero())
    trainer = Trainer(problem, Evaluator(problem), weighting, "products")
    run = last(trainer)
    assert run.failure is None
    state, order_key, train = trainer._start(0)
    order = orders(problem, jax.random.fold_in(order_key, 0))
    steps = len(order[None])
    assert steps == 3

    def rows(step):
        batch = take(train, jax.tree.map(lambda one: one[step], order))
        found = jax.jacobian(
            lambda encoder: losses(
                state.params | {"encoder": encoder}, state.model_state, None, batch
            )[0]
        )(state.params["encoder"])
        return np.stack([found[task].ravel() for task in problem.tasks])

    for step in range(steps):
        expected = rows(step) @ rows((step + 1) % steps)[0]
        weights = [run.weights[task][step] for task in problem.tasks]
        np.testing.assert_allclose(weights, expected, rtol=1e-4)
