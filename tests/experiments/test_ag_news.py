import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.networks.text import hashed_ids
from experiments.problems.ag_news import AGENCIES, BUCKETS, ag_news, plain_text, split_tag, words
from tests.experiments.tfds_folders import STORIES, write_stories


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return ag_news(data_dir=str(write_stories(tmp_path_factory.mktemp("tfds"), copies=4)))


@pytest.mark.parametrize(("title", "description", "agency"), STORIES)
def test_the_tag_is_the_label_and_not_in_the_input(title, description, agency):
    text, found = split_tag(title, description)
    assert found == agency
    assert not {"ap", "afp", "reuters", "associated"} & set(words(text))
    assert title.split()[0] in text
    if agency is not None:
        for place in ("NEW YORK", "VEIGA", "ACEH", "()", " - "):
            assert place not in text


def test_plain_text():
    raw = (
        "doesn #39;t cost  #36;46, quot;he said quot; &lt;b&gt;AT amp;T&lt;/b&gt;\\Rates Rises; up"
    )
    assert plain_text(raw) == 'doesn\'t cost $46,"he said" AT&T Rates Rises; up'
    no_entities = "for two centuries; nothing; then regulators;"
    assert plain_text(no_entities) == no_entities
    assert words("Doesn't cost $46") == ["doesn't", "cost", "46"]


def test_labels_and_inputs_of_the_test_split(problem):
    expected = [-1 if agency is None else AGENCIES.index(agency) for _, _, agency in STORIES]
    np.testing.assert_array_equal(problem.test["agency"], expected)
    np.testing.assert_array_equal(problem.test["topic"], np.arange(len(STORIES)) % 4)
    texts = [words(split_tag(title, description)[0]) for title, description, _ in STORIES]
    np.testing.assert_array_equal(problem.test["ids"], hashed_ids(texts, BUCKETS, 64))
    names = hashed_ids([["ap"], ["afp"], ["reuters"], ["associated"]], BUCKETS, 1)
    for split in (problem.train, problem.validation, problem.test):
        assert not np.isin(split["ids"], names).any()
    assert (problem.size("train"), problem.size("validation")) == (36, 4)


def test_missing_labels_are_masked(problem):
    batch = {field: jnp.asarray(values) for field, values in problem.test.items()}
    labelled = problem.labelled(batch)
    np.testing.assert_array_equal(labelled["agency"], [a is not None for _, _, a in STORIES])
    assert labelled["topic"].all()
    params, state = problem.init(jax.random.key(0))
    key = jax.random.key(1)
    some = {field: values[jnp.array(labelled["agency"])] for field, values in batch.items()}
    np.testing.assert_allclose(
        problem.losses(params, state, key, batch)[0]["agency"],
        problem.losses(params, state, key, some)[0]["agency"],
        rtol=1e-6,
    )


def test_without_any_label_the_loss_is_finite_and_its_gradient_zero(problem):
    batch = {**problem.test, "agency": np.full(len(STORIES), -1, np.int32)}
    params, state = problem.init(jax.random.key(0))
    loss, gradient = jax.value_and_grad(
        lambda params: problem.losses(params, state, jax.random.key(1), batch)[0]["agency"]
    )(params)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))
    assert not problem.present(batch)["agency"]


def test_problem(problem, check_problem):
    check_problem(problem.with_settings(batch_size=36))
