"""Training runs: every form of a step, one program for all numbers, and the metrics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_problem import (
    IN_PARTS,
    TARGETS,
    THREE_TARGETS,
    encoder,
    heads,
    losses,
    make_problem,
    outputs,
    shared,
    split,
)

import mtl_jax
from mtl_jax._base import Aggregator, Signal
from mtl_jax.compare import WEIGHTINGS, Task, mean_of, training
from mtl_jax.compare.data import take
from mtl_jax.compare.training import Evaluator, Setting, Trainer, settings_of, single_task

WHOLE = {"shared": shared}
FORMS = {"in parts": IN_PARTS, "whole": WHOLE}
ERROR = "squared error"
THREE = make_problem(THREE_TARGETS, **IN_PARTS, train=split(64, 0), epochs=2)


@pytest.fixture(scope="module")
def three():
    """What trains three tasks on an encoder."""
    return Trainer(THREE)


def setting(name, learning_rate=0.01, make=None, **parameters):
    make = WEIGHTINGS[name] if make is None else make
    return Setting(name, make, learning_rate, parameters, single_task=single_task(THREE, {}))


def last(trainer, name, seed=0, **own):
    *_, run = trainer.run(setting(name, **own) if isinstance(name, str) else name, seed)
    return run


def alone(trainer, task, seed=0):
    (found,) = [one for one in settings_of(trainer.problem, {}, True) if one.task == task]
    return last(trainer, found, seed)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_every_known_weighting_trains(name, three):
    run = last(three, name)
    # The indicators of this one lie in (0, 1], these errors do not.
    if name == "dynamic_task_prioritization_metrics":
        assert run.failure == "no finite update in epoch 2"
        return
    assert run.failure is None
    assert run.skipped == 0
    for task in three.problem.tasks:
        for part in ("validation", "test"):
            assert np.isfinite(run.metrics[part][task][ERROR]).all()
            assert len(run.metrics[part][task][ERROR]) == three.problem.epochs
    total = [sum(run.train_losses[task][epoch] for task in run.train_losses) for epoch in (0, -1)]
    assert total[1] < total[0]
    made = three._default(setting(name))
    if isinstance(made, Aggregator):
        assert run.measured_at == "parameters"
        assert run.weights == {}
    else:
        places = {Signal.GRAMIAN: "representation", Signal.TASK_GRADIENTS: "parameters"}
        assert run.measured_at == places.get(made.needs)
        assert list(run.weights) == list(three.problem.tasks)
        assert all(weights.shape == (4,) for weights in run.weights.values())
        assert all(np.isfinite(weights).all() for weights in run.weights.values())
    assert set(run.conflict) == ({"share", "cosine"} if run.measured_at else set())


def test_the_next_seeds_and_numbers_compile_nothing(three):
    """And what is found with other numbers is what a program with these as constants finds."""
    last(three, "stch")
    again = last(three, "stch", seed=1, learning_rate=0.02, mu=0.5)
    assert again.compilations > 0  # mu is given where it was not
    for mu in (0.3, 0.7):
        run = last(three, "stch", seed=1, learning_rate=0.01 + mu / 100, mu=mu)
        assert (run.compilations, run.compile_seconds) == (0, 0)

    def constants(learning_rate, steps):
        return optax.adam(float(learning_rate))  # which nothing traced can be

    problem = make_problem(
        THREE_TARGETS, **IN_PARTS, train=split(64, 0), epochs=2, optimizer=constants
    )
    trainer = Trainer(problem)
    expected = last(trainer, "stch", seed=1, learning_rate=0.017, mu=0.7)
    for task in run.weights:
        np.testing.assert_allclose(run.weights[task], expected.weights[task], rtol=1e-5)
        np.testing.assert_allclose(run.train_losses[task], expected.train_losses[task], rtol=1e-5)
    assert last(trainer, "stch", seed=1, learning_rate=0.017, mu=0.7).compilations == 0
    other = last(trainer, "stch", seed=1, learning_rate=0.1, mu=0.7)
    assert other.compilations > 0
    assert other.train_losses != expected.train_losses


def step_arguments(problem, seed=0):
    """What the first step of a run starts from, with all training examples as its batch."""
    init_key = jax.random.split(jax.random.key(seed), 3)[0]
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
    gradient_fn = Trainer(problem).gradient(mtl_jax.upgrad(), place)
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
    gradient_fn = Trainer(problem).gradient(mtl_jax.trimmed_mean(1), "parameters")
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
    run = last(Trainer(problem, conflict=True), name, seed=5)
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
    trainer = Trainer(make_problem(**FORMS[form], train=train, labelled=labelled, epochs=1))
    masked, only = last(trainer, name), alone(trainer, "line")
    np.testing.assert_allclose(
        masked.metrics["test"]["line"][ERROR], only.metrics["test"]["line"][ERROR], rtol=1e-5
    )
    assert np.isfinite(only.metrics["test"]["line"][ERROR]).all()
    assert list(only.metrics["test"]) == list(only.weights) == list(only.train_losses) == ["line"]
    assert only.weighting == "line alone"
    assert only.conflict == {}  # one task has none
    np.testing.assert_allclose(only.weights["line"], 1, rtol=1e-6)
    assert masked.skipped == only.skipped == 0
    assert np.isnan(masked.conflict["share"]).all()  # there is no pair
    assert np.isnan(masked.conflict["cosine"]).all()
    if name == "mgda":
        np.testing.assert_array_equal(masked.weights["square"], np.nan)
    assert np.isnan(masked.train_losses["square"]).all()


def test_a_batch_with_one_task_only_has_no_conflict():
    train = split(64, 0)
    train["square"][: 64 - 16] = np.nan

    def labelled(batch):
        return {task: jnp.isfinite(batch[task]) for task in ("line", "square")}

    problem = make_problem(**IN_PARTS, train=train, labelled=labelled, batch_size=4, epochs=1)
    run = last(Trainer(problem), "pcgrad")
    both = np.isfinite(run.weights["square"])  # in the others it is not there
    assert 0 < both.sum() < 16
    for values in run.conflict.values():
        np.testing.assert_array_equal(np.isfinite(values), both)


def test_steps_that_are_not_measured():
    problem = make_problem(**IN_PARTS, epochs=1)
    run = last(Trainer(problem), "sometimes", make=lambda _: mtl_jax.every(mtl_jax.mgda(), 4))
    for values in run.conflict.values():
        np.testing.assert_array_equal(np.isfinite(values), [True, False, False, False, True, False])


COUNTED = mean_of(lambda output, label: output, "calls")
"""A metric that is what the network says."""


def count_calls(params, model_state, batch):
    return dict.fromkeys(TARGETS, jnp.full(len(batch["x"]), model_state["calls"], jnp.float32))


@pytest.mark.parametrize(("form", "name"), [("in parts", "mgda"), ("whole", "equal")])
def test_the_model_state_is_carried(form, name):
    tasks = dict.fromkeys(TARGETS, Task(COUNTED))
    run = last(Trainer(make_problem(**FORMS[form], tasks=tasks, predict=count_calls)), name)
    assert run.metrics["test"]["line"]["calls"] == [6, 12, 18]


# How many steps a call makes, and from where the data come


def found_in(run):
    return jax.tree.leaves((run.train_losses, run.metrics, run.weights))


@pytest.fixture(scope="module")
def expected():
    """A run of 19 steps an epoch, all in one call."""
    trainer = Trainer(make_problem(batch_size=10, epochs=2))
    assert trainer.steps_per_call == 20
    return last(trainer, "random_weighting", seed=3)


def test_what_is_kept_of_steps_does_not_depend_on_how_many_a_call_makes(expected, monkeypatch):
    monkeypatch.setattr(training, "STEPS", 6)
    seen = []
    trainer = Trainer(make_problem(batch_size=10, epochs=2))
    assert trainer.steps_per_call == 6
    *_, run = trainer.run(
        setting("random_weighting"),
        3,
        on_steps=lambda run, step, losses: seen.append((step, losses)),
    )
    assert [step for step, _ in seen] == [6, 12, 18, 20, 24, 30, 36, 40]
    for ours, theirs in zip(found_in(run), found_in(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    means = np.average([losses["line"] for _, losses in seen[:4]], weights=[6, 6, 6, 2])
    np.testing.assert_allclose(means, run.train_losses["line"][0], rtol=1e-5)


@pytest.mark.parametrize("source", ["device", "host", "one by one"])
def test_one_step_a_call(source, expected, monkeypatch):
    """From the device, from arrays of the host, and from examples that are read one by one."""
    changes = {}
    if source == "device":
        monkeypatch.setattr(training, "SMALL", 0)
    elif source == "host":
        monkeypatch.setattr("mtl_jax.compare.data.DEVICE_BYTES", 0)
    else:
        train = split(200, 0)
        examples = [{field: values[i] for field, values in train.items()} for i in range(200)]
        changes = {"train": examples}
    monkeypatch.setattr(training, "SECONDS", 0)  # looks at every step
    trainer = Trainer(make_problem(batch_size=10, epochs=2, **changes))
    assert trainer.steps_per_call == 1
    assert (trainer.data is None) == (source != "device")
    seen = []
    *_, run = trainer.run(
        setting("random_weighting"), 3, on_steps=lambda run, step, losses: seen.append(step)
    )
    assert seen == list(range(1, 41))
    for ours, theirs in zip(found_in(run), found_in(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_convolution_is_not_put_into_a_loop():
    def convolved(params, model_state, key, batch):
        x = jax.lax.conv_general_dilated(
            batch["x"][:, None, :], params["kernel"], window_strides=(1,), padding="SAME"
        )
        return dict.fromkeys(TARGETS, jnp.mean(x**2)), model_state

    problem = make_problem(
        losses=convolved, init=lambda key: ({"kernel": jnp.ones((2, 1, 3))}, {"calls": 0})
    )
    assert Trainer(problem).steps_per_call == 1
    assert Trainer(make_problem()).steps_per_call == 6


# What is not finite


def test_a_batch_that_is_not_finite_is_skipped_and_counted():
    train = split(200, 0)
    train["x"][17] = np.inf
    run = last(Trainer(make_problem(train=train)), "equal")
    # 192 of 200 examples are used in an epoch, so a bad one is met at most once in each.
    assert 1 <= run.skipped <= 3
    assert run.failure is None
    assert np.isfinite(run.metrics["test"]["line"][ERROR]).all()


# Metrics


def test_missing_labels_count_neither_in_losses_nor_in_metrics():
    def labelled(batch):
        return {task: jnp.isfinite(batch[task]) for task in TARGETS}

    parts = {part: split(size, seed) for part, size, seed in (("train", 64, 0), ("test", 70, 2))}
    parts["train"]["square"][:] = np.nan
    parts["test"]["square"][20:] = np.nan
    problem = make_problem(labelled=labelled, batch_size=16, **parts)
    params, state = problem.init(jax.random.key(0))
    metrics = Evaluator(problem, batch_size=32)(params, state, "test")
    predictions = outputs(params, parts["test"]["x"])
    for task, number in (("line", 70), ("square", 20)):
        errors = (np.array(predictions[task]) - parts["test"][task])[:number] ** 2
        np.testing.assert_allclose(metrics[task][ERROR], errors.mean(), rtol=1e-5)
    other = Evaluator(problem)(params, state, "test")  # in batches of another size
    for task, by_name in metrics.items():
        np.testing.assert_allclose(by_name[ERROR], other[task][ERROR], rtol=1e-5)


def test_losses_without_labels_leave_gradients_finite():
    params, state = make_problem().init(jax.random.key(0))
    batch = {name: np.full_like(values, np.nan) for name, values in split(4, 0).items()}
    batch["x"] = split(4, 0)["x"]
    gradient = jax.grad(lambda p: losses(p, state, None, batch)[0]["line"])(params)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("small", [True, False])
def test_the_second_batch_is_that_of_the_next_step(small, monkeypatch):
    """Its products are those of the order in which the run goes through the data."""
    if not small:
        monkeypatch.setattr(training, "SMALL", 0)
    problem = make_problem(
        **WHOLE, epochs=2, batch_size=64, optimizer=lambda rate, steps: optax.set_to_zero()
    )
    weighting = mtl_jax.vector_weighting(
        lambda losses, state, present, steps, products: (products[:, 0], state),
        needs=Signal.SECOND_BATCH,
        directions=lambda state, present: (jnp.array([[1.0, 0.0]]), None),
    )
    trainer = Trainer(problem)
    run = last(trainer, setting("products", make=lambda settings: weighting))
    assert run.failure is None
    assert run.measured_at is None
    assert trainer.steps_per_call == (3 if small else 1)
    params, model_state = problem.init(jax.random.split(jax.random.key(0), 3)[0])
    batches = problem.train_batches(0)
    items = itertools.islice(iter(batches), 7)

    def rows(batch):
        def own(encoder):
            return losses(params | {"encoder": encoder}, model_state, None, batch)[0]

        found = jax.jacobian(own)(params["encoder"])
        return np.stack([found[task].ravel() for task in problem.tasks])

    found = [rows(take(batches.device_data, item)) for item in items]
    expected = [one @ following[0] for one, following in itertools.pairwise(found)]
    weights = np.stack([run.weights[task] for task in problem.tasks], axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
