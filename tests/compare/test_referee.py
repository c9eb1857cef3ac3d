import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_problem import (
    IN_PARTS,
    TARGETS,
    encoder,
    heads,
    losses,
    make_problem,
    outputs,
    split,
)

import mtl_jax
from mtl_jax.compare import compare, named_weightings
from mtl_jax.compare.findings import Findings
from mtl_jax.compare.tables import main_table
from mtl_jax.compare.training import Evaluator


@pytest.fixture(scope="module")
def problem():
    return make_problem()


def nothing_finite(settings):
    return mtl_jax.vector_weighting(lambda losses, *rest: (losses * jnp.nan, rest[0]))


@pytest.fixture(scope="module")
def comparison(problem):
    """Of weightings whose runs are known, with three seeds and each task alone."""
    weightings = named_weightings(["adaptive", "random_weighting"]) | {
        "ones": lambda settings: mtl_jax.constant(dict.fromkeys(TARGETS, 1.0)),
        "line only": lambda settings: mtl_jax.constant({"line": 1.0, "square": 0.0}),
        "bad": nothing_finite,
    }
    return compare(problem, weightings, seeds=[3, 0, 1])


def test_same_seed_same_numbers(problem, comparison):
    """In another comparison, too."""
    weightings = named_weightings(["random_weighting", "adaptive"])
    again = compare(problem, weightings, seeds=[3], alone=False)
    for name in again.runs:
        assert comparison.runs[name][0].test == again.runs[name][0].test
        for task in TARGETS:
            np.testing.assert_array_equal(
                comparison.runs[name][0].weights[task], again.runs[name][0].weights[task]
            )


def test_weightings_share_initial_parameters_and_batches(problem):
    """Losses that tell which batch it was, and whose gradient is 0: the same for all."""

    def fingerprint(params, model_state, key, batch):
        start = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))
        value = 20 + jnp.mean(batch["x"]) + jax.lax.stop_gradient(start) + jax.random.uniform(key)
        return dict.fromkeys(TARGETS, value + 0 * start), model_state

    comparison = compare(
        make_problem(losses=fingerprint), named_weightings(["adaptive", "dwa"]), seeds=[0, 1]
    )
    runs = [*comparison.runs.values(), *comparison.alone.values()]
    for seed in (0, 1):
        values = {tuple(next(iter(r[seed].train_losses.values()))) for r in runs}
        assert len(values) == 1
    assert runs[0][0].train_losses != runs[0][1].train_losses
    # Every epoch has its own order.
    assert len(set(runs[0][0].train_losses["line"])) == problem.epochs


def test_equal_is_always_run_and_is_constant_ones(comparison):
    names = ["equal", "adaptive", "random_weighting", "ones", "line only", "bad"]
    assert list(comparison.runs) == names
    assert comparison.runs["equal"][0].test == comparison.runs["ones"][0].test


def test_alone_is_the_network_on_that_loss_only(comparison):
    expected = comparison.runs["line only"][0]
    alone = comparison.alone["line"][0]
    np.testing.assert_allclose(alone.test["line"], expected.test["line"], rtol=1e-5)
    assert list(alone.weights) == ["line"]
    change = comparison.change_from_alone(comparison.runs["equal"][0])
    ours, lone = comparison.runs["equal"][0].test, comparison.alone
    expected_change = np.mean([1 - ours[t][-1] / lone[t][0].test[t][-1] for t in TARGETS])
    np.testing.assert_allclose(change, expected_change)


def test_a_failing_run_says_so_and_does_not_stop_the_others(comparison):
    for run in comparison.runs["bad"]:
        assert run.failure == "no finite update in epoch 1"
        assert run.skipped == 6
        assert len(run.test["line"]) == 1
    assert all(run.failure is None for run in comparison.runs["equal"])


def test_a_batch_that_is_not_finite_is_skipped_and_counted():
    train = split(200, 0)
    train["x"][17] = np.inf
    comparison = compare(make_problem(train=train), {}, seeds=[0], alone=False)
    (run,) = comparison.runs["equal"]
    # 192 of 200 examples are used in an epoch, so a bad one is met at most once in each.
    assert 1 <= run.skipped <= 3
    assert run.failure is None
    assert np.isfinite(run.test["line"]).all()


def test_one_bad_label_of_one_task_costs_a_step_an_epoch_and_is_shown():
    """The task that has it, alone, is skipped as often; the other one, alone, never."""

    def plain(params, zs, batch):
        return {t: jnp.mean((zs[t] @ head - batch[t]) ** 2) for t, head in params["heads"].items()}

    train = split(96, 0)  # all of which are met in every epoch
    train["line"][17] = np.nan
    problem = make_problem(**IN_PARTS | {"heads": plain}, train=train, epochs=2)
    comparison = compare(problem, named_weightings(["mgda", "excess_mtl"]), seeds=[0])
    for (run,) in comparison.runs.values():
        assert run.failure is None
        assert run.skipped == 2
        for task in TARGETS:
            assert np.isfinite(run.test[task] + run.train_losses[task]).all()
        for weights in run.weights.values():
            assert np.isnan(weights).sum() == 2
    assert [runs[0].skipped for runs in comparison.alone.values()] == [2, 0]
    table = main_table(Findings(comparison))
    assert table.headers[-1] == "skipped steps"
    assert [row[-1] for row in table.rows] == ["2"] * 4


def test_missing_labels_count_neither_in_losses_nor_in_metrics():
    def labelled(batch):
        return {task: jnp.isfinite(batch[task]) for task in TARGETS}

    parts = {part: split(size, seed) for part, size, seed in (("train", 64, 0), ("test", 70, 2))}
    parts["train"]["square"][:] = np.nan
    parts["test"]["square"][20:] = np.nan
    problem = make_problem(labelled=labelled, batch_size=16, **parts)
    comparison = compare(problem, named_weightings(["adaptive"]), seeds=[0], alone=False)
    (run,) = comparison.runs["adaptive"]
    np.testing.assert_array_equal(run.weights["square"], np.nan)  # a task that is not there
    np.testing.assert_allclose(run.weights["line"], 1, rtol=1e-6)
    assert np.isnan(run.train_losses["square"]).all()
    assert run.skipped == 0

    params, state = problem.init(jax.random.key(0))
    metrics = Evaluator(problem, batch_size=32)(params, state, "test")
    predictions = outputs(params, parts["test"]["x"])
    for task, number in (("line", 70), ("square", 20)):
        errors = (np.array(predictions[task]) - parts["test"][task])[:number] ** 2
        np.testing.assert_allclose(metrics[task], errors.mean(), rtol=1e-5)


def test_evaluation_does_not_depend_on_the_batch_size(problem):
    params, state = problem.init(jax.random.key(1))
    one, other = (Evaluator(problem, size)(params, state, "test") for size in (32, 500))
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


def test_model_state_is_carried(problem):
    seen = []

    def scores(params, model_state, batch):
        calls = jnp.full(len(batch["x"]), model_state["calls"], jnp.float32)
        seen.append(calls)
        return dict.fromkeys(TARGETS, calls)

    comparison = compare(make_problem(scores=scores), {}, seeds=[0], alone=False)
    assert comparison.runs["equal"][0].test["line"] == [6, 12, 18]


def test_best_epoch_is_chosen_on_validation_data(comparison):
    run = copy.deepcopy(comparison.runs["equal"][0])
    run.validation = {"line": [3.0, 1.0, 2.0], "square": [30.0, 20.0, 20.0]}  # lower is better
    run.test = {"line": [0.0, 9.0, 9.0], "square": [0.0, 9.0, 9.0]}
    assert comparison.best_epoch(run) == 1
    run.validation["line"] = [3.0, np.nan, 2.0]
    assert comparison.best_epoch(run) == 2


def test_seeds_share_a_compiled_program(comparison):
    compiled = [run.compile_seconds > 0 for run in comparison.runs["adaptive"]]
    assert compiled == [True, False, False]


def test_a_weighting_that_needs_more_tasks_is_an_error_before_training(problem):
    def on_epoch(run):
        raise AssertionError("something was trained")

    for name in ("krum", "trimmed_mean"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run on 'toy': {name}.* tasks"):
            compare(problem, named_weightings(["adaptive", name]), on_epoch=on_epoch)


def test_conflicts_of_all_weightings_on_request():
    problem = make_problem(**IN_PARTS, epochs=1)
    comparison = compare(problem, named_weightings(["graddrop"]), seeds=[0], conflict=True)
    places = {name: runs[0].measured_at for name, runs in comparison.runs.items()}
    assert places == {"equal": "representation", "graddrop": "parameters"}
    for (run,) in comparison.runs.values():
        share, cosine = run.conflict["share"], run.conflict["cosine"]
        assert cosine.shape == (6,)
        assert (np.abs(cosine) < 1).all()
        np.testing.assert_array_equal(share, cosine < 0)  # there is one pair
    assert comparison.alone["line"][0].conflict == {}  # one task has no conflict


def test_wrong_settings(problem):
    with pytest.raises(ValueError, match=r"no weighting 'adaptiv'.*'adaptive'.*Known: equal,"):
        named_weightings(["adaptiv"])
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="seed"):
            compare(problem, {}, seeds=seeds)
    with pytest.raises(ValueError, match="`epochs` must be at least 1, got 0"):
        compare(problem.with_settings(epochs=0), {})
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        compare(problem.with_settings(batch_size=0), {})
    with pytest.raises(ValueError, match="batch size, 500, is larger .* 200 examples"):
        compare(problem.with_settings(batch_size=500), {})
    with pytest.raises(ValueError, match="has no tasks"):
        make_problem(tasks={})
    with pytest.raises(ValueError, match=r"test split.*\{'x': 70, 'line': 69"):
        test = split(70, 2)
        make_problem(test=test | {"line": test["line"][:69]})


def test_the_losses_are_given_whole_or_in_two_parts():
    problem = make_problem(**IN_PARTS).with_settings(epochs=2)
    params, state = problem.init(jax.random.key(0))
    batch = split(4, 0)
    found, new_state = problem.losses(params, state, None, batch)
    expected, _ = losses(params, state, None, batch)
    jax.tree.map(np.testing.assert_allclose, found, expected)
    assert new_state["calls"] == 1
    doubled = dataclasses.replace(
        problem, heads=lambda *args: jax.tree.map(lambda loss: 2 * loss, heads(*args))
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 2 * b),
        doubled.losses(params, state, None, batch)[0],
        expected,
    )
    for changes, given in (
        ({"losses": None}, "none of them"),
        ({"losses": None, "encoder": encoder}, "`encoder`"),
        ({"heads": heads}, "`losses` and `heads`"),
        ({"encoder": encoder, "heads": heads}, "`losses` and `encoder` and `heads`"),
    ):
        with pytest.raises(ValueError, match=f"'toy' must be given either `losses`.*got {given}"):
            make_problem(**changes)


def test_losses_without_labels_leave_gradients_finite(problem):
    params, state = problem.init(jax.random.key(0))
    batch = {name: np.full_like(values, np.nan) for name, values in split(4, 0).items()}
    batch["x"] = split(4, 0)["x"]
    gradient = jax.grad(lambda p: losses(p, state, None, batch)[0]["line"])(params)
    assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
