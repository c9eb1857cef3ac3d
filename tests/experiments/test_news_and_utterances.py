import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from experiments.problems.news_and_utterances import news_and_utterances
from tests.experiments.tfds_folders import write_stories

DATASET_OF = {
    "subject": "news",
    "agency": "news",
    "language": "utterances",
    "topic": "utterances",
    "role": "utterances",
}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = write_stories(tmp_path_factory.mktemp("tfds"), copies=8)
    return news_and_utterances(str(folder), max_utterances=300)


def test_datasets_of_unequal_size(problem):
    assert problem.sizes("train") == {"news": 72, "utterances": 210}
    assert problem.sizes("test") == {"news": 10, "utterances": 60}
    assert problem.dataset_of == DATASET_OF
    agencies = problem.train["news"]["agency"]
    assert 0 < np.mean(agencies == -1) < 0.5


def test_all_tasks_are_learned_by_one_encoder(problem):
    """Some steps with a weighting over the parameters lower all five losses."""
    params, model_state = problem.init(jax.random.key(0))
    sizes = {"news": 24, "utterances": 32}
    batch = {
        name: {field: jnp.asarray(values[: sizes[name]]) for field, values in fields.items()}
        for name, fields in problem.train.items()
    }
    losses_fn = lambda params, batch: problem.losses(params, model_state, None, batch)[0]  # noqa: E731
    gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.upgrad(), shared=problem.shared)
    train_step = mtl_jax.make_train_step(gradient, optax.adam(problem.learning_rate))
    state = train_step.init(params, batch)
    mask = problem.present(batch)
    history = []
    for _ in range(8):
        state, value = train_step(state, batch, mask=mask)
        history.append(value.losses)
    for task in DATASET_OF:
        assert history[-1][task] < 0.9 * history[0][task], task

    # A batch without any agency: the task is absent, and the others go on.
    none = batch | {"news": batch["news"] | {"agency": jnp.full(24, -1)}}
    present = problem.present(none)
    assert not present["agency"]
    assert all(present[task] for task in DATASET_OF if task != "agency")
    _, value = train_step(state, none, mask=present)
    assert value.weights["agency"] == 0
    assert value.weights["subject"] > 0


def test_microbatches_are_as_the_whole(problem):
    """Microbatches of both datasets; some of them name no agency."""
    params, _ = problem.init(jax.random.key(0))
    batch = jax.tree.map(lambda values: jnp.asarray(values[:24]), problem.train)
    agency = np.full(24, -1)
    agency[[0, 4, 8, 9]] = [0, 1, 2, 0]  # of microbatches 0 and 1 of four
    batch["news"]["agency"] = jnp.asarray(agency)
    losses_fn = lambda params, batch: problem.losses(params, {}, None, batch)[0]  # noqa: E731
    count = lambda batch: jax.tree.map(jnp.sum, problem.labelled(batch))  # noqa: E731
    microbatches = mtl_jax.microbatched(losses_fn, 4, count, batch_argnums=1)
    whole, found = (
        jax.jit(functools.partial(pullback, fn))(params, batch) for fn in (losses_fn, microbatches)
    )
    for expected, ours in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def pullback(losses_fn, params, batch):
    losses, back = jax.vjp(lambda params: losses_fn(params, batch), params)
    return losses, back(losses)
