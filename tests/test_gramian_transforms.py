"""The transforms where the task gradients are measured: rows, Gramian, shared parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

WAYS = ("unrolled", "map", "vmap", "low_memory", 2, 3)
HELD = ("unrolled", "map", "vmap", 2, 3)
each_way = pytest.mark.parametrize("rows", WAYS)


def tasks_for(rows):
    """The number of tasks of a test: several batches of them, the last not full, for a number."""
    return 7 if isinstance(rows, int) else 3


def names(number):
    return tuple(f"task{k}" for k in range(number))


def make_params(number, dtype=np.float64, width=5, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {
            "kernel": rng.normal(size=(4, width)),
            "bias": rng.normal(size=width),
            "gain": np.float64(1),
        },
        "heads": rng.normal(size=(number, width)),
    }
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def make_batch(number, dtype=np.float64, size=6):
    rng = np.random.default_rng(1)
    return rng.normal(size=(size, 4)).astype(dtype), rng.normal(size=(number, size)).astype(dtype)


def encode(encoder, x):
    """At a gain of 0 the output is finite, and its gradient is not."""
    gain = jnp.sqrt(encoder["gain"])
    return jnp.tanh(gain * (x @ encoder["kernel"]) + encoder["bias"][None, :])


def vector_of_losses(params, x, y):
    z = encode(params["encoder"], x)
    return jnp.mean((params["heads"] @ z.T - y) ** 2, axis=1)


def losses_fn(params, x, y):
    """One row of `heads` for each task."""
    return dict(zip(names(len(y)), jnp.unstack(vector_of_losses(params, x, y)), strict=True))


def in_encoder(path):
    return path.startswith("encoder/")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@jax.jit
def weighted_gradient(params, weights, x, y):
    """The gradient of the weighted sum of the losses, in one backward pass."""
    return jax.grad(lambda params: jnp.dot(weights, vector_of_losses(params, x, y)))(params)


def jacobian(params, batch):
    """The rows of the Jacobian: for each task the gradient of its loss alone."""
    units = np.eye(len(batch[1])).astype(batch[1].dtype)
    return [weighted_gradient(params, unit, *batch) for unit in units]


def over(rows, part=None):
    """The rows as a matrix, of all parameters or of a part."""
    return np.stack([flat(row if part is None else row[part]) for row in rows])


def vector(tree):
    return np.array(jax.tree.leaves(tree))


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows, also its state."""

    def update(losses, state, present, steps, gramian):
        sums = jnp.sum(gramian, axis=1)
        return sums, sums

    return mtl_jax.vector_weighting(
        update, lambda tasks, key: tasks.full(0), needs=mtl_jax.Signal.GRAMIAN
    )


ROW_SUMS = row_sums()


@functools.cache
def gradient_of(rows, shared=None):
    return mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows=rows, shared=shared, diagnostics=True)


@functools.cache
def program(rows, shared=None):
    return jax.jit(gradient_of(rows, shared).update)


def initial(number, dtype=np.float64):
    return ROW_SUMS.init(dict.fromkeys(names(number), dtype(0)))


# Rows, Gramian and gradient, in every way


@each_way
@pytest.mark.parametrize("number", [1, 2, 7])
def test_gramian_and_gradient_over_all_parameters(x64, rows, number):
    params, batch = make_params(number), make_batch(number)
    mask = dict.fromkeys(names(number), True) if number == 7 else None
    value, gradient, _ = program(rows)(params, initial(number), *batch, mask=mask)
    J = over(jacobian(params, batch))
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-13)
    assert tuple(value.weights) == names(number)
    weights = vector(value.weights)
    np.testing.assert_allclose(weights, (J @ J.T).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), weights @ J, rtol=1e-11, atol=1e-12)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert value.finite
    assert value.measured


def test_auto_is_the_way_for_the_number_of_tasks(x64):
    """The same program, so the same numbers: unrolled up to 5 tasks, a loop for more."""

    def text(rows, number, shared, masked):
        mask = dict.fromkeys(names(number), True) if masked else None
        args = make_params(number), initial(number), *make_batch(number)
        gradient = mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows=rows, shared=shared)
        return str(jax.make_jaxpr(gradient.update)(*args, mask=mask))

    for number, way, other in (
        *((number, "unrolled", "map") for number in (1, 2, 3, 5)),
        *((number, "map", "unrolled") for number in (6, 7)),
    ):
        shared, masked = (in_encoder, True) if number % 2 else (None, False)
        expected = text(way, number, shared, masked)
        assert text("auto", number, shared, masked) == expected
        assert text(other, number, shared, masked) != expected


@each_way
@pytest.mark.parametrize("form", ["predicate", "mask"])
def test_shared_parameters_alone_enter_the_gramian(x64, rows, form):
    number = tasks_for(rows)
    params, batch, state = make_params(number), make_batch(number), initial(number)
    if form == "mask":  # the same program
        flags = {"encoder": dict.fromkeys(params["encoder"], True), "heads": False}
        by_mask = mtl_jax.value_and_grad(
            losses_fn, ROW_SUMS, rows=rows, shared=flags, diagnostics=True
        )
        texts = [
            str(jax.make_jaxpr(gradient.update)(params, state, *batch))
            for gradient in (by_mask, gradient_of(rows, in_encoder), gradient_of(rows))
        ]
        assert texts[0] == texts[1] != texts[2]
        return
    value, gradient, _ = program(rows, in_encoder)(params, state, *batch)
    J = over(jacobian(params, batch), "encoder")
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)
    # All parameters, heads too, get the gradient of the weighted sum.
    expected = weighted_gradient(params, vector(value.weights), *batch)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", HELD)
def test_an_aggregator_gets_the_rows_of_the_shared_parameters(x64, rows):
    number = tasks_for(rows)
    params, batch = make_params(number), make_batch(number)
    aggregator = mtl_jax.moco()
    gradient_fn = mtl_jax.value_and_grad(
        losses_fn, aggregator, rows=rows, shared=in_encoder, diagnostics=True
    )
    state = gradient_fn.init(params, *batch)
    update = jax.jit(gradient_fn.update)
    value, gradient, new_state = update(params, state, *batch)

    rows_ = jacobian(params, batch)
    J = over(rows_, "encoder")
    expected, expected_state = aggregator.update(
        J, aggregator.init(J[0], value.losses), losses=value.losses
    )
    np.testing.assert_allclose(flat(gradient["encoder"]), expected, rtol=1e-9)
    np.testing.assert_allclose(new_state.steps, expected_state.steps)
    assert not np.array_equal(new_state.steps, state.steps)
    # The heads get the gradient of the plain sum, which is that of their own task's loss.
    np.testing.assert_allclose(flat(gradient["heads"]), over(rows_, "heads").sum(0), rtol=1e-10)
    assert value.weights is None
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)


def test_an_aggregator_does_not_look_at_an_absent_task(x64):
    params, batch = make_params(3), make_batch(3)
    mask = {task: task != "task1" for task in names(3)}
    gradient_fn = mtl_jax.value_and_grad(losses_fn, mtl_jax.trimmed_mean(0), shared=in_encoder)
    state = gradient_fn.init(params, *batch)
    _, gradient, _ = jax.jit(gradient_fn.update)(params, state, *batch, mask=mask)
    J = over(jacobian(params, batch), "encoder")
    np.testing.assert_allclose(flat(gradient["encoder"]), J[[0, 2]].mean(axis=0), rtol=1e-10)
    np.testing.assert_array_equal(gradient["heads"][1], 0)
    assert np.all(gradient["heads"][0] != 0)


@each_way
def test_an_absent_task_counts_nowhere(x64, rows):
    params, batch = make_params(7), make_batch(7)
    present = np.arange(7) != 1
    mask = dict(zip(names(7), present, strict=True))
    value, gradient, _ = program(rows)(params, initial(7), *batch, mask=mask)
    J = over(jacobian(params, batch))[present]
    weights = vector(value.weights)
    np.testing.assert_allclose(weights[present], (J @ J.T).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), weights[present] @ J, rtol=1e-10, atol=1e-14)
    expected = mtl_jax.diagnostics(J @ J.T)
    np.testing.assert_allclose(value.diagnostics.conflicting, expected.conflicting)
    assert weights[1] == 0
    assert value.diagnostics.norms[1] == 0


def test_with_an_absent_task_a_solver_finds_what_it_finds_without(x64):
    weighting = mtl_jax.dual_proj()

    @jax.jit
    def run(params, x, y, mask):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, diagnostics=True)
        return gradient_fn(params, gradient_fn.init(params, x, y), x, y, mask=mask)

    params, (x, y) = make_params(3), make_batch(3)
    value, gradient, _ = run(params, x, y, {task: task != "task1" for task in names(3)})
    others = np.array([0, 2])
    two = params | {"heads": params["heads"][others]}
    expected, two_gradient, _ = run(two, x, y[others], None)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14)
    close(flat(gradient["encoder"]), flat(two_gradient["encoder"]))
    close(gradient["heads"][others], two_gradient["heads"])
    close(gradient["heads"][1], 0)
    np.testing.assert_allclose(value.diagnostics.conflicting, expected.diagnostics.conflicting)
    assert value.weights["task1"] == 0
    assert value.diagnostics.norms[1] == 0


@each_way
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gramian_is_at_least_float32(rows, dtype):
    number = tasks_for(rows)
    params, batch = make_params(number, dtype), make_batch(number, dtype)
    value, gradient, _ = program(rows)(params, initial(number, dtype), *batch)
    assert value.gramian.dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradient))
    J = over(jacobian(params, batch)).astype(np.float64)
    # Low memory multiplies in the network's own dtype.
    tolerance = 0.05 if dtype == jnp.bfloat16 and rows == "low_memory" else 1e-2
    tolerance = 1e-5 if dtype == jnp.float32 else tolerance
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=tolerance, atol=tolerance)


@each_way
def test_a_gradient_that_is_not_finite_keeps_the_state(x64, rows):
    params, batch, mask = make_params(7), make_batch(7), dict.fromkeys(names(7), True)
    _, _, state = program(rows)(params, initial(7), *batch, mask=mask)
    assert np.all(np.asarray(state.steps) == 1)
    params["encoder"]["gain"] = np.float64(0)
    value, _, after = program(rows)(params, state, *batch, mask=mask)
    assert np.all(np.isfinite(vector(value.losses)))
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert np.all(np.isnan(vector(value.weights)))
    assert not value.finite


@each_way
def test_complex_parameters(x64, rows):
    number = 7 if isinstance(rows, int) else 2
    params = {"a": np.array([1.0 + 2j, -0.5j]), "b": np.array(0.3)}
    factors = np.arange(2.0, 2 + number)

    def losses_fn(params):
        size = jnp.abs(params["a"]) ** 2
        others = [jnp.sum(jnp.real(params["a"]) + factor * size) for factor in factors[:-1]]
        return (jnp.sum(size) * params["b"], *others)

    gradient_fn = mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows=rows)
    value, gradient, _ = jax.jit(gradient_fn.update)(params, gradient_fn.init(params))

    @jax.jit
    def row(unit):
        return jax.grad(lambda params: jnp.dot(unit, jnp.stack(losses_fn(params))))(params)

    rows_ = [row(unit) for unit in np.eye(number)]
    J = np.array([np.concatenate([[row["b"]], row["a"].real, row["a"].imag]) for row in rows_])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)
    weights = np.array(value.weights)
    expected = sum(w * np.asarray(row["a"]) for w, row in zip(weights, rows_, strict=True))
    np.testing.assert_allclose(gradient["a"], expected, rtol=1e-12)


def of_complex(z):
    return {"a": jnp.abs(z[0]) ** 2 * jnp.real(z[1]), "b": jnp.imag(z[0]) ** 3 + jnp.real(z[1])}


def of_parts(parts):
    return of_complex(jnp.array([parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]]))


def test_complex_parameters_are_as_their_parts_on_a_second_batch(x64):
    """Also after the step that the method takes in between."""
    z, parts = np.array([0.3 + 0.8j, -0.7 + 0.4j]), np.array([0.3, 0.8, -0.7, 0.4])
    for rows in ("auto", "map"):
        weights = []
        for function, at in ((of_complex, z), (of_parts, parts)):
            for method in (mtl_jax.auto_lambda(optax.sgd(0.1), 0.3), mtl_jax.modo(gamma=0.5)):
                gradient = mtl_jax.value_and_grad(
                    lambda p, scale, f=function: jax.tree.map(lambda x: scale * x, f(p)),
                    method,
                    rows=rows,
                )
                state = gradient.init(at, 1.0)
                for _ in range(2):
                    value, _, state = gradient(at, state, 1.0, second=(1.5,))
                weights.append(vector(value.weights))
        np.testing.assert_allclose(weights[:2], weights[2:], rtol=1e-10)
        assert abs(weights[0][0] - weights[0][1]) > 1e-3


def test_complex_parameters_of_an_encoder(x64):
    z = np.array([0.3 + 0.8j, -0.7 + 0.4j])
    grams = {}
    for rows in ("map", "low_memory"):
        gradient = mtl_jax.representation_value_and_grad(
            lambda params: params["z"] ** 2,
            lambda params, zs: {task: of_complex(zs[task])[task] for task in "ab"},
            ROW_SUMS,
            tasks=("a", "b"),
            gramian="encoder",
            rows=rows,
        )
        params = {"z": z}
        grams[rows] = gradient(params, gradient.init(params))[0].gramian
    np.testing.assert_allclose(grams["low_memory"], grams["map"], rtol=1e-12)


def test_a_module_that_can_be_called_says_which_parameters_are_shared():
    """As one of Equinox, with booleans for its parameters."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Network:
        trunk: jax.Array
        head: jax.Array

        def __call__(self, x):
            raise AssertionError("the network was called")

    def losses_fn(network):
        z = network.trunk**2
        return {"a": jnp.sum(z * network.head), "b": jnp.sum(z) + jnp.sum(network.head**3)}

    network = Network(jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0]))
    for option, by_tree, by_path in (
        ("shared", Network(True, False), lambda path: path == "trunk"),
        ("groups", Network("low", "high"), {"trunk": "low", "head": "high"}.__getitem__),
    ):
        found = []
        for choice in (by_tree, by_path):
            gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.mgda(), **{option: choice})
            found.append(gradient(network, gradient.init(network))[1:])
        jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_weighting_of_the_task_gradients(x64):
    """It reports its weights, alone and in wrappers; all parameters get their gradient."""
    excess = mtl_jax.excess_mtl(0.5)
    batch = make_batch(3)
    moved = [
        jax.tree.map(lambda leaf, shrink=shrink: leaf * shrink, make_params(3))
        for shrink in (1.0, 0.9, 0.7)
    ]

    def follow(weighting):
        gradient_fn = mtl_jax.value_and_grad(
            losses_fn, weighting, shared=in_encoder, diagnostics=True
        )
        update, state = jax.jit(gradient_fn.update), gradient_fn.init(moved[0], *batch)
        history = []
        for params in moved:
            value, gradient, state = update(params, state, *batch)
            weights, rows = vector(value.weights), jacobian(params, batch)
            expected = weighted_gradient(params, weights, *batch)
            np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-11, atol=1e-12)
            J = over(rows, "encoder") if value.measured else np.zeros((3, 1))
            np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)
            history.append((bool(value.measured), weights))
        return zip(*history, strict=True)

    def direct(sequence):
        """The weights of the method for the task gradients by the encoder."""
        losses, state = dict.fromkeys(names(3), np.float64(0)), None
        for params in sequence:
            rows = [row["encoder"] for row in jacobian(params, batch)]
            rows = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
            state = excess.init(losses, params=params["encoder"]) if state is None else state
            weights, state = excess.update(losses, state, task_gradients=rows)
            yield vector(weights)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-9)
    expected = list(direct(moved))
    assert np.ptp(expected[2]) > 1e-2
    measured, weights = follow(excess)
    assert all(measured)
    close(weights, expected)
    measured, weights = follow(mtl_jax.every(excess, 2))
    assert measured == (True, False, True)
    first, last = direct(moved[::2])
    close(weights, [first, first, last])
    measured, weights = follow(mtl_jax.ema(excess, 0.5))
    assert all(measured)
    first, second, third = expected
    averages = [first, (first + 2 * second) / 3, (first + 2 * second + 4 * third) / 7]
    close(weights, averages)


# Steps that do not measure


class Counter:
    """Counts how often a backward pass runs through an identity."""

    def __init__(self):
        self.calls = 0

        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, cotangent):
            jax.debug.callback(self.count)
            return (cotangent,)

        identity.defvjp(lambda x: (x, None), backward)
        self.identity = identity

    def count(self):
        self.calls += 1

    def since(self):
        jax.effects_barrier()
        calls, self.calls = self.calls, 0
        return calls

    def losses(self, params, *batch):
        bias = self.identity(params["encoder"]["bias"])
        return losses_fn(params | {"encoder": params["encoder"] | {"bias": bias}}, *batch)


@pytest.mark.parametrize("rows", HELD)
def test_every_leaves_the_backward_passes_out_in_between(rows):
    counter, number = Counter(), tasks_for(rows)
    params, batch = make_params(number, np.float32), make_batch(number, np.float32)
    gradient_fn = mtl_jax.value_and_grad(counter.losses, mtl_jax.every(ROW_SUMS, 4), rows=rows)
    state = gradient_fn.init(params, *batch)
    update = jax.jit(gradient_fn.update)
    calls, weights, measured = [], [], []
    for step in range(9):
        moved = jax.tree.map(lambda leaf, s=step: leaf * np.float32(1 - 0.05 * s), params)
        value, gradient, state = update(moved, state, *batch)
        calls.append(counter.since())
        weights.append(tuple(map(float, value.weights.values())))
        measured.append(bool(value.measured))
        assert np.any(value.gramian != 0) == value.measured
        expected = weighted_gradient(moved, vector(value.weights), *batch)
        np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-4, atol=1e-5)
    # Those for the rows, as many at once as there shall be, and the weighted one.
    passes = {"unrolled": 3, "map": 3, "vmap": 1, 2: 4, 3: 3}[rows]
    assert calls == [1 + passes, 1, 1, 1] * 2 + [1 + passes]
    assert measured == [step % 4 == 0 for step in range(9)]
    assert len(set(weights)) == 3
    assert [len(set(group)) for group in (weights[:4], weights[4:8], weights[8:])] == [1, 1, 1]


def test_nash_mtl_bounded_at_every_step():
    """By optax, on what is shared: the norm of LibMTL and TorchJD, whose weights are held."""
    rows = np.array([[3.0, 0.0], [-1.0, 2.0]], np.float32)  # with 0 outside of their hull

    def losses_fn(params, scale):
        return {
            task: scale * jnp.dot(row, params["shared"], precision="highest") + params[task] ** 2
            for task, row in zip(("a", "b"), rows, strict=True)
        }

    params = {"shared": np.zeros(2, np.float32), "a": np.float32(1), "b": np.float32(-2)}
    shared = {"shared": True, "a": False, "b": False}
    bounded = optax.masked(optax.clip_by_global_norm(1.0), shared)
    steps = {}
    for name, max_norm, optimizer in (("ours", 1.0, optax.identity()), ("theirs", None, bounded)):
        weighting = mtl_jax.every(mtl_jax.nash_mtl(max_norm), 3)
        gradient = mtl_jax.value_and_grad(losses_fn, weighting, shared=shared)
        optimizer = optax.chain(optimizer, optax.sgd(1.0))
        steps[name] = mtl_jax.make_train_step(gradient, optimizer, donate=False)
    states = {name: step.init(params, np.float32(1)) for name, step in steps.items()}
    scales = [1.0, 2.0, 0.1, 4.0, 40.0, 0.01]
    norms = {name: [] for name in steps}
    gramian = rows.astype(float) @ rows.T
    for number, scale in enumerate(scales):
        for name, step in steps.items():
            before, (states[name], value) = states[name], step(states[name], np.float32(scale))
            moved = before.params["shared"] - states[name].params["shared"]
            norms[name].append(np.linalg.norm(moved))
        # The weights of the last decision, of norm sqrt(2), and the gradient cut off at 1.
        decided = scales[number - number % 3]
        weights = np.array(list(value.weights.values()))
        np.testing.assert_allclose(decided**2 * gramian @ weights, 1 / weights, rtol=1e-4)
        direction = scale * weights @ rows
        np.testing.assert_allclose(
            moved, direction / max(1, np.linalg.norm(direction)), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(  # the heads' gradients are not cut
            states[name].params["a"], (1 - 2 * weights[0]) * before.params["a"], rtol=1e-4
        )
    assert max(norms["theirs"]) < 1 + 1e-5
    np.testing.assert_allclose(norms["ours"], [1, 2, 0.1, 1, 10, 0.0025], rtol=1e-4)


def test_every_leaves_them_out_under_vmap_over_seeds_too():
    seeds, counter = 2, Counter()
    batch = make_batch(3, np.float32)
    params = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(make_params(3, np.float32, seed=s) for s in range(2))
    )
    gradient_fn = mtl_jax.value_and_grad(
        counter.losses, mtl_jax.every(ROW_SUMS, 3), rows="unrolled"
    )
    many = jax.jit(jax.vmap(lambda params, state: gradient_fn(params, state, *batch)))
    alone = [jax.tree.map(lambda leaf, seed=seed: leaf[seed], params) for seed in range(seeds)]
    first = gradient_fn.init(alone[0], *batch)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * seeds), first)
    calls, history = [], []
    for _ in range(5):
        value, _, state = many(params, state)
        calls.append(counter.since())
        history.append(value.weights["task0"])
    assert [count / calls[1] for count in calls] == [4, 1, 1, 4, 1]
    # And each seed gets what it gets alone.
    one = jax.jit(gradient_fn.update)
    for seed in range(seeds):
        value, _, _ = one(alone[seed], first, *batch)
        np.testing.assert_allclose(history[0][seed], value.weights["task0"], rtol=1e-4)


def test_every_remains_a_branch_under_two_vmaps():
    """Of seeds and of folds."""
    params, batch = make_params(3, np.float32), make_batch(3, np.float32)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, mtl_jax.every(ROW_SUMS, 3))
    first = gradient_fn.init(params, *batch)
    state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, 2, *leaf.shape)), first)
    step = jax.vmap(jax.vmap(lambda state: gradient_fn(params, state, *batch)))
    assert "cond[" in str(jax.make_jaxpr(step)(state))
    value, _, _ = jax.jit(step)(state)
    expected, _, _ = jax.jit(gradient_fn.update)(params, first, *batch)
    np.testing.assert_allclose(value.weights["task0"][1, 1], expected.weights["task0"], rtol=1e-5)


def test_seeds_that_are_due_at_different_steps():
    """Where one seed of a batch is due, the others keep their weights."""
    params, batch = make_params(3, np.float32), make_batch(3, np.float32)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, mtl_jax.every(ROW_SUMS, 2))
    first = gradient_fn.init(params, *batch)
    update = jax.jit(gradient_fn.update)
    expected, _, second = update(params, first, *batch)
    second = second._replace(inner=second.inner._replace(weights=jnp.array([1.0, 2.0, 3.0])))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    value, _, state = jax.jit(jax.vmap(lambda state: gradient_fn(params, state, *batch)))(state)
    np.testing.assert_array_equal([value.weights[t][1] for t in names(3)], [1, 2, 3])
    got = [value.weights[task][0] for task in names(3)]
    np.testing.assert_allclose(got, list(expected.weights.values()), rtol=1e-5)


# What a step costs


def test_low_memory_never_holds_the_rows():
    number = 20
    params, batch = make_params(number, np.float32, width=64), make_batch(number, np.float32)
    state = initial(number, np.float32)

    def holds_rows(rows):
        """Whether there is an array that has the tasks and all of a parameter in it."""
        gradient_fn = mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows=rows, shared=in_encoder)
        text = str(jax.make_jaxpr(gradient_fn.update)(params, state, *batch))
        return f"f32[{number},4,64]" in text

    assert all(holds_rows(rows) for rows in ("map", "vmap", 10))
    assert not holds_rows("low_memory")


def test_a_number_of_rows_at_once_has_a_memory_in_between():
    number, width, size = 20, 32, 512
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"layers": [shape((width, width))] * 2, "heads": shape((number, width))}
    args = params, initial(number, np.float32), shape((size, width)), shape((number, size))

    def losses_fn(params, x, y):
        for kernel in params["layers"]:
            x = jnp.tanh(x @ kernel)
        losses = jnp.mean((params["heads"] @ x.T - y) ** 2, axis=1)
        return dict(zip(names(number), jnp.unstack(losses), strict=True))

    def bytes_of(rows):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows=rows)
        compiled = jax.jit(gradient_fn.update).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one, five, all_at_once = map(bytes_of, ("map", 5, "vmap"))
    of_a_task = 4 * size * width  # the derivative by the output of a layer
    assert five > one + 4 * of_a_task / 2
    assert all_at_once > five + 15 * of_a_task / 2


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("number", [2, 5])
def test_a_step_costs_one_forward_and_k_backward_passes(number):
    """Compiled FLOPs against the floor; the heads' share of the encoder's is below 2 %."""
    width, size = 256, 64
    params = make_params(number, np.float32, width)
    params["encoder"]["kernel"] = np.ones((width, width), np.float32)
    x, y = np.ones((size, width), np.float32), np.ones((number, size), np.float32)
    forward = flops(vector_of_losses, params, x, y)
    plain = flops(weighted_gradient, params, np.ones(number, np.float32), x, y)
    floor = forward + number * (plain - forward)
    for shared in (None, in_encoder):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, ROW_SUMS, rows="unrolled", shared=shared)
        measured = flops(gradient_fn.update, params, initial(number, np.float32), x, y)
        assert measured < 1.05 * floor + 2 * number**2 * width**2


# Errors, diagnostics, training


def test_low_memory_needs_a_forward_derivative():
    counter = Counter()
    gradient_fn = mtl_jax.value_and_grad(
        lambda x: (counter.identity(x), x**2), ROW_SUMS, rows="low_memory"
    )
    x = jnp.array(1.0)
    with pytest.raises(TypeError, match="rows='low_memory' needs the forward derivative"):
        gradient_fn(x, gradient_fn.init(x))


def test_errors_of_shared_and_rows():
    params, batch = make_params(2, np.float32), make_batch(2, np.float32)
    params["heads"] = dict(zip(names(2), params["heads"], strict=True))

    def losses_fn(params, x, y):
        return {task: jnp.sum(x) * jnp.sum(head) for task, head in params["heads"].items()}

    weighting = mtl_jax.mgda()
    state = weighting.init({"task0": 1.0, "task1": 1.0})

    def call(**options):
        mtl_jax.value_and_grad(losses_fn, weighting, **options)(params, state, *batch)

    with pytest.raises(
        ValueError, match="selects none.*encoder/bias, encoder/gain, encoder/kernel, heads/task0"
    ):
        call(shared=lambda path: "encodr" in path)
    with pytest.raises(ValueError, match="with the structure of the parameters"):
        call(shared={"encoder": True})
    with pytest.raises(TypeError, match="for 'encoder/bias' it says 1"):
        call(shared=jax.tree.map(lambda _: 1, params))
    with pytest.raises(ValueError, match="`rows` must be one of auto, unrolled"):
        call(rows="all")
    for rows in (0, -1, 2.0, True, None):
        with pytest.raises(ValueError, match="`rows` must be one of auto, unrolled.*of tasks"):
            call(rows=rows)
    for reads_rows in (mtl_jax.graddrop(), mtl_jax.excess_mtl()):
        with pytest.raises(ValueError, match="reads all of them"):
            mtl_jax.value_and_grad(losses_fn, reads_rows, rows="low_memory")
    with pytest.raises(ValueError, match="reads the Gramian of the task gradients"):
        weighting.update({"task0": 1.0, "task1": 1.0}, state)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got float32\[3, 3\]"):
        weighting.update({"task0": 1.0, "task1": 1.0}, state, gramian=jnp.eye(3))


def test_diagnostics_of_a_weighting_that_reads_the_losses(x64):
    params, batch = make_params(3), make_batch(3)
    weighting = mtl_jax.adaptive()
    plain, diagnosed = (
        mtl_jax.value_and_grad(losses_fn, weighting, diagnostics=diagnose)
        for diagnose in (False, True)
    )
    state = plain.init(params, *batch)
    value, gradient, _ = jax.jit(plain.update)(params, state, *batch)
    diagnosed_value, found, _ = jax.jit(diagnosed.update)(params, state, *batch)
    np.testing.assert_allclose(flat(found), flat(gradient), rtol=1e-12)
    assert value.gramian is None
    assert value.measured is None
    assert value.diagnostics is None
    J = over(jacobian(params, batch))
    unit = J / np.linalg.norm(J, axis=1)[:, None]
    np.testing.assert_allclose(diagnosed_value.diagnostics.cosines, unit @ unit.T, rtol=1e-10)


@pytest.mark.parametrize(
    "make",
    [mtl_jax.aligned_mtl, lambda: mtl_jax.every(mtl_jax.imtl_g(), 3), mtl_jax.graddrop],
    ids=["aligned_mtl", "every", "graddrop"],
)
def test_train_steps_in_a_scan(make):
    params, batch = make_params(3, np.float32), make_batch(3, np.float32)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, make(), shared=in_encoder)
    train_step = mtl_jax.make_train_step(gradient_fn, optax.adam(1e-2))
    state = train_step.init(params, *batch, weighting_key=jax.random.key(0))
    state, losses = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, _: (lambda out: (out[0], out[1].losses))(train_step(state, *batch)),
            state,
            length=100,
        )
    )(state)
    assert state.step == 100
    assert state.skipped == 0
    total = sum(losses.values())
    assert total[-1] < 0.7 * total[0]
