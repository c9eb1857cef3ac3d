"""What a problem is made of, and what is wrong with one."""

import contextlib
import itertools
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_problem import (
    DATASET_OF,
    IN_PARTS,
    SQUARED_ERROR,
    TARGETS,
    dataset_errors,
    encoder,
    heads,
    losses,
    make_problem,
    make_two_datasets,
    split,
)

import mtl_jax
from mtl_jax.compare import Problem, Task, accuracy, load_problem, mean_absolute_error
from mtl_jax.compare.data import take
from mtl_jax.compare.results import MetricInfo
from tests.compare.problems import ALL, ASSAYS, Spots, molecules, scenes, spots


def measured(problem, params, model_state, split, batch_size):
    """The metrics of each task, as the comparison computes them."""
    found = {task: [] for task in problem.tasks}

    @jax.jit
    def statistics(batch, valid):
        outputs = problem.predict(params, model_state, batch)
        labels, counted = problem.labels(batch), problem.counted(batch, valid)
        return {
            name: (
                {
                    metric.name: metric.statistics(outputs[name], labels[name], counted[name])
                    for metric in task.metrics
                },
                counted[name],
            )
            for name, task in problem.tasks.items()
        }

    for batch, valid in problem.evaluation_batches(split, batch_size):
        for task, values in statistics(batch, valid).items():
            found[task].append(values)
    return {
        name: {
            metric.name: metric.over(
                [(statistics[metric.name], counted) for statistics, counted in found[name]]
            )
            for metric in task.metrics
        }
        for name, task in problem.tasks.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_metrics_do_not_depend_on_the_size_of_the_batches(name):
    problem = ALL[name]()
    params, model_state = problem.init(jax.random.key(0))
    found, whole = (measured(problem, params, model_state, "test", size) for size in (9, 28))
    for task in problem.tasks:
        assert list(found[task]) == [metric.name for metric in problem.tasks[task].metrics]
        for metric, value in found[task].items():
            np.testing.assert_allclose(value, whole[task][metric], rtol=1e-5)
            assert np.isfinite(value)


@pytest.mark.parametrize("name", ALL)
def test_a_loop_by_hand_learns_all_tasks(name):
    """From the batches of the problem, wherever they come from, with its optimizer and its mask."""
    problem = ALL[name](learning_rate=0.03)
    params, model_state = problem.init(jax.random.key(0))
    losses = lambda *args: problem.losses(*args)  # noqa: E731
    gradient = mtl_jax.value_and_grad(losses, mtl_jax.equal(), has_aux=True)
    step = mtl_jax.make_train_step(
        gradient, problem.optimizer(problem.learning_rate, 80), new_model_state=lambda aux: aux
    )
    batches = problem.train_batches(0)
    state = step.init(params, batches.example(), model_state=model_state, rng=jax.random.key(1))
    history = []
    with contextlib.closing(iter(batches)) as items:
        for item in itertools.islice(items, 80):
            batch = take(batches.device_data, item)
            state, value = step(state, batch, mask=problem.present(batch))
            history.append(value.losses)
    assert state.skipped == 0
    for task in problem.tasks:
        first, last = (
            np.mean([losses[task] for losses in part]) for part in (history[:8], history[-8:])
        )
        assert last < 0.9 * first, task


@pytest.mark.parametrize("batch_size", [7, 500])
def test_a_metric_is_over_all_examples_of_its_own_dataset(batch_size):
    problem = make_two_datasets()
    params, model_state = problem.init(jax.random.key(0))
    found = measured(problem, params, model_state, "test", batch_size)
    outputs = problem.predict(params, model_state, problem.test)
    for task, dataset in DATASET_OF.items():
        expected = np.mean((outputs[task] - problem.test[dataset][task]) ** 2)
        np.testing.assert_allclose(found[task]["squared error"], expected, rtol=1e-5)


def test_labels_are_the_field_of_the_name_another_field_or_made_of_the_batch():
    tasks = {
        "line": Task(SQUARED_ERROR),
        "square": Task(SQUARED_ERROR, label="product"),
    }
    problem = make_problem(tasks=tasks)
    batch = split(4, 0)
    labels = problem.labels(batch)
    np.testing.assert_array_equal(labels["line"], batch["line"])
    np.testing.assert_array_equal(labels["square"], batch["product"])
    found = molecules().labels(molecules().test)
    np.testing.assert_array_equal(found[ASSAYS[5]], molecules().test["toxic"][:, 5])
    tasks["square"] = Task(SQUARED_ERROR, label=lambda fields: 2 * fields["x"][:, 0])
    two = make_two_datasets(tasks=tasks)
    found = two.labels(two.test)
    np.testing.assert_array_equal(found["square"], 2 * two.test["few"]["x"][:, 0])


def test_which_examples_count_and_which_tasks_are_present():
    problem = molecules()
    batch, valid = list(problem.evaluation_batches("validation", 16))[1]
    counted = problem.counted(batch, valid)
    for number, assay in enumerate(ASSAYS):
        expected = (np.arange(16) < 4) & (batch["toxic"][:, number] >= 0)
        np.testing.assert_array_equal(counted[assay], expected)
    absent = {"toxic": np.where(np.arange(12) == 3, -1, batch["toxic"])}
    present = problem.present(absent)
    assert [bool(present[assay]) for assay in ASSAYS] == [number != 3 for number in range(12)]
    assert make_problem().present(split(4, 0)) is None
    np.testing.assert_array_equal(make_problem().counted(batch, valid)["line"], valid[""])


def test_what_tables_and_pictures_need_to_know():
    info = scenes().info()
    assert info.tasks == {
        "segments": {"mIoU": MetricInfo(True, "%"), "pixel accuracy": MetricInfo(True, "%")},
        "depth": {
            "absolute error": MetricInfo(False, "cm"),
            "relative error": MetricInfo(False, ""),
        },
    }
    assert info.examples == {"train": {"": 64}, "validation": {"": 20}, "test": {"": 28}}
    assert (info.epochs, info.steps_per_epoch, info.batch_size) == (2, 4, {"": 16})
    assert (info.name, info.learning_rate, info.data) == ("scenes", 0.01, scenes().digest())
    two = make_two_datasets().info()
    assert two.examples["train"] == {"many": 100, "few": 24}
    assert two.batch_size == {"many": 16, "few": 5}


def test_settings_are_changed_where_they_are_given():
    problem = make_problem(**IN_PARTS).with_settings(epochs=7, batch_size=None, learning_rate=0.5)
    assert (problem.epochs, problem.batch_size, problem.learning_rate) == (7, 32, 0.5)
    assert problem.size("train") == 200
    whole = make_problem().losses
    params, state = problem.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, split(5, 0))
    jax.tree.map(
        np.testing.assert_allclose,
        problem.losses(params, state, None, batch)[0],
        whole(params, state, None, batch)[0],
    )


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({"losses": None}, "none of them"),
        ({"losses": None, "encoder": encoder}, "`encoder`"),
        ({"heads": heads}, "`losses` and `heads`"),
        ({"encoder": encoder, "heads": heads}, "`losses` and `encoder` and `heads`"),
    ],
)
def test_losses_are_given_whole_or_in_two_parts(changes, given):
    with pytest.raises(ValueError, match=f"'toy' must be given either `losses`.*got {given}"):
        make_problem(**changes)


class Wrong(grain.transforms.Filter):
    def filter(self, element):
        return True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_problem(tasks={}), "'toy' has no task with a metric"),
        (lambda: make_problem(tasks={"sum": Task(())}), "'toy' has no task with a metric"),
        (
            lambda: Task([accuracy(), accuracy(ignore=0)]),
            r"different names; got \['accuracy', 'accuracy'\]",
        ),
        (
            lambda: make_problem(tasks={"line": Task(label="lines")}),
            r"labels of the task 'line' of the problem 'toy' must be a field of the validation "
            r"split, which has \['x', 'line', 'square', 'product'\]; got 'lines'",
        ),
        (
            lambda: spots(test=[{"picture": np.zeros((5, 5))}]),
            r"'row' .* field of the test split, which has \['picture'\]",
        ),
        (lambda: make_problem(epochs=0).steps_per_epoch, "`epochs` must be at least 1, got 0"),
        (lambda: make_problem(batch_size=0).steps_per_epoch, "`batch_size` must be at least 1"),
        (
            lambda: make_problem(batch_size=201).steps_per_epoch,
            "batch size, 201, is larger than the training data of 'toy': 200 examples",
        ),
        (lambda: spots(workers=-1), "`workers` must be at least 0, got -1"),
        (lambda: spots(transformations=[Wrong()]), "Map, RandomMap or MapWithIndex, .*got .*Wrong"),
        (
            lambda: make_two_datasets(dataset_of=None),
            r"`dataset_of` .* for each task, \['line', 'square'\], .*got None",
        ),
        (
            lambda: make_two_datasets(dataset_of=DATASET_OF | {"line": "none"}),
            r"of \['many', 'few'\]; got .*'none'",
        ),
        (
            lambda: make_two_datasets(batch_size={"many": 16}),
            r"`batch_size` .* one for each dataset.*got \{'many': 16\}",
        ),
        (
            lambda: make_two_datasets(batch_size={"many": 16, "few": 25}).steps_per_epoch,
            r"batch size, 25, is larger .*, dataset 'few': 24 examples",
        ),
        (
            lambda: make_two_datasets(test={"many": split(9, 0)}),
            r"same datasets; .*the test split \['many'\]",
        ),
        (
            lambda: make_two_datasets(train={"many": split(9, 0), "few": {}}),
            r"train split of the problem 'toy', dataset 'few', must hold .*got \{\}",
        ),
        (
            lambda: make_two_datasets(losses=None, encoder=encoder, heads=heads),
            "given by `losses` and `shared`",
        ),
        (
            lambda: make_two_datasets(
                **{part: split(30, 0) for part in ("train", "validation", "test")}
            ),
            "one dataset, so `dataset_of` must be None",
        ),
    ],
)
def test_what_does_not_fit_together_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_dataset_can_be_arrays_and_another_be_read():
    problem = spots(
        **{
            part: {"one": Spots(9, 0), "two": split(9, 0)}
            for part in ("train", "validation", "test")
        },
        tasks={"row": Task(), "line": Task(mean_absolute_error())},
        dataset_of={"row": "one", "line": "two"},
        transformations=[],
        batch_size=3,
        encoder=None,
        heads=None,
        losses=losses,
    )
    batch = problem.train_batches(0).example()
    assert batch["one"]["picture"].shape == (3, 5, 5)
    assert batch["two"]["x"].shape == (3, 3)


def test_microbatches_of_datasets_in_which_a_task_is_absent():
    """Losses and gradients of a batch in microbatches; some have no label of a task at all."""
    problem = make_two_datasets()
    batch = {
        "many": jax.tree.map(lambda x: x[:16], problem.train["many"]),
        "few": jax.tree.map(lambda x: x[:8], problem.train["few"]),
    }
    there = np.zeros(8, bool)
    there[[1, 5]] = True  # both in the second of four microbatches
    batch["few"]["there"] = there

    def losses_fn(params, batch):
        found = dataset_errors(params, batch)
        square = mtl_jax.masked_mean(found["square"], batch["few"]["there"])
        return {"line": jnp.mean(found["line"]), "square": square}

    def count(batch):
        return {"line": batch["many"]["x"].shape[0], "square": jnp.sum(batch["few"]["there"])}

    microbatches = mtl_jax.microbatched(losses_fn, 4, count, batch_argnums=1)
    params, _ = problem.init(jax.random.key(0))
    state = mtl_jax.upgrad().init({"line": 0.0, "square": 0.0})
    whole, in_parts = (
        jax.jit(mtl_jax.value_and_grad(fn, mtl_jax.upgrad(), shared=problem.shared))(
            params, state, batch
        )
        for fn in (losses_fn, microbatches)
    )
    for expected, found in zip(jax.tree.leaves(whole), jax.tree.leaves(in_parts), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


# By name


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_problems.py").write_text(
        "from toy_problem import make_problem\n"
        "ready = make_problem(name='ready')\n"
        "def made(): return make_problem(name='made')\n"
        "def read(data_dir=None): return make_problem(name=f'read {data_dir}')\n"
        "def wrong(): return 3\n"
    )
    yield "my_problems"
    sys.modules.pop("my_problems", None)


def test_problems_by_name(module):
    assert isinstance(load_problem(f"{module}:ready"), Problem)
    names = [load_problem(f"{module}:{name}", "data").name for name in ("ready", "made", "read")]
    assert names == ["ready", "made", "read data"]
    assert set(load_problem(f"{module}:ready").tasks) == set(TARGETS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_problems", "named as package.module:name; got 'my_problems'"),
        ("nowhere_at_all:ready", "'nowhere_at_all:ready': No module named 'nowhere_at_all'"),
        ("my_problems:other", "module 'my_problems' has no 'other'"),
        ("my_problems:wrong", "'my_problems:wrong' is a int; a Problem is wanted"),
    ],
)
def test_names_of_no_problem(module, name, message):
    with pytest.raises(ValueError, match=message):
        load_problem(name)
