"""Tasks with data of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_problem import (
    SOURCE_OF,
    encoder,
    heads,
    make_problem,
    make_two_sources,
    outputs,
    source_errors,
    split,
)

import mtl_jax
from mtl_jax.compare import compare, named_weightings
from mtl_jax.compare.batches import orders, steps_per_epoch, take
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.report import results
from mtl_jax.compare.sections import markdown_report


def test_an_epoch_passes_over_the_largest_source_and_over_the_others_as_often_as_it_takes():
    problem = make_two_sources()
    assert steps_per_epoch(problem) == 6
    found = orders(problem, jax.random.key(0))
    assert {source: order.shape for source, order in found.items()} == {
        "many": (6, 16),
        "few": (6, 5),
    }
    many, few = (np.array(found[source]).ravel() for source in ("many", "few"))
    assert len(set(many)) == 96  # none twice
    assert sorted(few[:24]) == list(range(24))  # all of them, then a new order
    assert len(set(few[24:])) == 6
    assert not np.array_equal(few[24:], few[:6])
    again = orders(problem, jax.random.key(1))
    assert not np.array_equal(again["many"], found["many"])


def test_one_source_has_the_order_it_has_without_names():
    order = orders(make_problem(), jax.random.key(3))[None]
    expected = jax.random.permutation(jax.random.key(3), 200)[:192].reshape(6, 32)
    np.testing.assert_array_equal(order, expected)


def test_a_batch_has_the_chosen_examples_of_each_source():
    problem = make_two_sources()
    batch = take(problem.train, {"many": np.array([3, 5]), "few": np.array([1])})
    np.testing.assert_array_equal(batch["many"]["line"], problem.train["many"]["line"][[3, 5]])
    np.testing.assert_array_equal(batch["few"]["x"], problem.train["few"]["x"][[1]])


@pytest.mark.parametrize("batch_size", [7, 500])
def test_a_metric_is_over_all_examples_of_its_own_source(batch_size):
    problem = make_two_sources()
    params, model_state = problem.init(jax.random.key(0))
    metrics = Evaluator(problem, batch_size=batch_size)(params, model_state, "test")
    for task, source in SOURCE_OF.items():
        fields = problem.test[source]
        expected = np.mean((outputs(params, fields["x"])[task] - fields[task]) ** 2)
        np.testing.assert_allclose(metrics[task], expected, rtol=1e-5)


def test_weightings_of_every_signal_train_on_several_sources():
    problem = make_two_sources()
    weightings = named_weightings(["upgrad", "db_mtl"])
    comparison = compare(problem, weightings, seeds=[0], conflict=True)
    for name, runs in comparison.runs.items():
        assert runs[0].measured_at == "parameters"
        for task, values in runs[0].train_losses.items():
            assert values[-1] < values[0], (name, task)
    # Alone, a task has its own source's examples; conflicts are between different inputs.
    assert np.isfinite(comparison.runs["equal"][0].conflict["cosine"]).all()
    assert set(comparison.alone) == set(SOURCE_OF)
    found = results(comparison)["settings"]
    assert found["batch_size"] == {"many": 16, "few": 5}
    assert found["examples"]["train"] == {"many": 100, "few": 24}
    report = markdown_report(comparison)
    assert "100 (many) + 24 (few) train" in report
    assert "batch 16 (many) + 5 (few)" in report


def test_pieces_of_sources_in_which_a_task_is_absent():
    """Losses and gradients of a batch in pieces; some pieces have no label of a task at all."""
    problem = make_two_sources()
    batch = {
        "many": jax.tree.map(lambda x: x[:16], problem.train["many"]),
        "few": jax.tree.map(lambda x: x[:8], problem.train["few"]),
    }
    there = np.zeros(8, bool)
    there[[1, 5]] = True  # both in the second of four pieces
    batch["few"]["there"] = there

    def losses_fn(params, batch):
        found = source_errors(params, batch)
        square = mtl_jax.masked_mean(found["square"], batch["few"]["there"])
        return {"line": jnp.mean(found["line"]), "square": square}

    def count(batch):
        return {"line": batch["many"]["x"].shape[0], "square": jnp.sum(batch["few"]["there"])}

    pieces = mtl_jax.microbatched(losses_fn, 4, count, batch_argnums=1)
    params, _ = problem.init(jax.random.key(0))
    state = mtl_jax.upgrad().init({"line": 0.0, "square": 0.0})
    whole, in_pieces = (
        jax.jit(mtl_jax.value_and_grad(fn, mtl_jax.upgrad(), shared=problem.shared))(
            params, state, batch
        )
        for fn in (losses_fn, pieces)
    )
    for expected, found in zip(jax.tree.leaves(whole), jax.tree.leaves(in_pieces), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_of": None}, r"`source_of` .* for each task, \['line', 'square'\], .*got None"),
        ({"source_of": SOURCE_OF | {"line": "none"}}, r"of \['many', 'few'\]; got .*'none'"),
        ({"batch_size": {"many": 16}}, r"`batch_size` .* one for each source.*got \{'many': 16\}"),
        ({"batch_size": {"many": 16, "few": 25}}, r"batch size, 25, is larger .*'few': 24 examp"),
        ({"test": {"many": split(9, 0)}}, r"same sources; .*the test split \['many'\]"),
        ({"train": {"many": split(9, 0), "few": {}}}, r"train split, source 'few', of .*got \{\}"),
        ({"losses": None, "encoder": encoder, "heads": heads}, r"given by `losses` and `shared`"),
        (
            {part: split(30, 0) for part in ("train", "validation", "test")},
            r"one source of data, so `source_of` must be None",
        ),
    ],
)
def test_what_does_not_fit_together_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        steps_per_epoch(make_two_sources(**changes))
