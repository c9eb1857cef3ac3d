"""Several devices: arrays spread over a mesh give the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mtl_jax
from benchmarks.hlo import Collective, collectives
from mtl_jax._jacobian import choose_rows, gramian_of

TASKS, SEVEN = ("a", "b", "c"), tuple("abcdefg")
MASKS = [{task: np.array(task != absent) for task in TASKS} for absent in (None, "b", None)]


def make_params(tasks=TASKS):
    rng = np.random.default_rng(0)
    params = {
        "encoder": {
            "kernel": rng.normal(size=(8, 16)) / 3,
            "bias": rng.normal(size=16) / 3,
            "mix": rng.normal(size=(2, 16, 8)) / 4,
        },
        "heads": {task: rng.normal(size=8) for task in tasks},
    }
    return jax.tree.map(np.float32, params)


def make_batch(tasks=TASKS):
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(16, 8)).astype(np.float32)}
    return batch | {
        t: (rng.normal(size=16).astype(np.float32), rng.random(16) < 0.6) for t in tasks
    }


PARAMS, BATCH = make_params(), make_batch()


def encoder(params, batch):
    z = jnp.tanh(batch["x"] @ params["encoder"]["kernel"] + params["encoder"]["bias"][None])
    one, two = jnp.unstack(params["encoder"]["mix"])
    return {"one": jnp.tanh(z @ one), "two": z @ two}


def heads(params, zs, batch, mean=mtl_jax.masked_mean):
    def loss(task):
        label, seen = batch[task]
        z = zs[task]["one"] + zs[task]["two"]
        return mean((z @ params["heads"][task] - label) ** 2, seen)

    return {task: loss(task) for task in params["heads"]}


def global_mean(values, present):
    """The masked mean over the whole batch, of which each device has a part."""
    total = jax.lax.psum(jnp.sum(jnp.where(present, values, 0)), "data")
    return total / jnp.maximum(jax.lax.psum(jnp.sum(present, dtype=values.dtype), "data"), 1)


global_heads = functools.partial(heads, mean=global_mean)


def losses_of(params, batch, heads=heads):
    return heads(params, dict.fromkeys(params["heads"], encoder(params, batch)), batch)


def in_encoder(path):
    return path.startswith("encoder/")


def inverse_norms():
    """A weighting of the Gramian that compiles quickly."""

    def update(losses, state, present, steps, gramian):
        return jnp.where(present, 1 / jnp.sqrt(jnp.diagonal(gramian)), 0), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


# One weighting of each signal, and in what form it gets it.
SIGNALS = {
    "losses": (mtl_jax.adaptive(), {}),
    "losses after the step": (mtl_jax.famo(), {}),
    "representation": (inverse_norms(), {"gramian": "representation"}),
    "encoder": (mtl_jax.imtl_g(), {"gramian": "encoder", "shared": in_encoder}),
    "parameters": (mtl_jax.conflict_free(), {"diagnostics": True}),
    "every": (mtl_jax.every(inverse_norms(), 2), {"gramian": "representation"}),
    "task gradients": (mtl_jax.excess_mtl(), {"shared": in_encoder}),
    "aggregator": (mtl_jax.db_mtl(), {"shared": in_encoder}),
}


def transform(weighting, options, *, heads=heads, axis_name=None):
    if "gramian" in options:
        return mtl_jax.representation_value_and_grad(
            encoder, heads, weighting, tasks=TASKS, axis_name=axis_name, **options
        )
    losses_fn = functools.partial(losses_of, heads=heads)
    return mtl_jax.value_and_grad(losses_fn, weighting, axis_name=axis_name, **options)


# How the parameters lie: replicated, or spread along their longest axis, or, since JAX refuses
# some of that with explicit axes, along the axis that is contracted first.
def whole(leaf):
    return P()


def longest_axis(leaf):
    axis = int(np.argmax(leaf.shape))
    return P(*[None] * axis, "data") if leaf.ndim else P()


def first_axis_of_matrices(leaf):
    return P("data") if leaf.ndim == 2 else P()


LAYOUTS = {
    "replicated, Explicit": (AxisType.Explicit, whole),
    "replicated, Auto": (AxisType.Auto, whole),
    "fsdp, Explicit": (AxisType.Explicit, first_axis_of_matrices),
    "fsdp, Auto": (AxisType.Auto, longest_axis),
}


def make_mesh(axis_type=AxisType.Explicit):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def put(tree, mesh, rule):
    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, rule(leaf)))

    return jax.tree.map(place, tree)


def spread(leaf):
    return P("data")


def start(signal, params, batch, heads=heads, axis_name=None):
    weighting, options = SIGNALS[signal]
    gradient = transform(weighting, options, heads=heads, axis_name=axis_name)
    step = mtl_jax.make_train_step(gradient, optax.sgd(0.05, momentum=0.9))
    return step, step.init(params, batch)


def follow(step, state, batch, masks):
    """Three steps, the second without a task: what was found on the way, and the last state."""
    history = []
    for mask in masks:
        state, value = step(state, batch, mask=mask)
        history.append(value)
    assert state.skipped == 0
    return history, state


@functools.cache
def on_one_device(signal):
    step, state = start(signal, PARAMS, BATCH)
    return jax.device_get(follow(step, state, BATCH, MASKS))


def assert_same(actual, expected):
    """Equal to 1e-5 of a leaf's largest entry; a solver's residual is rounding and nothing else."""

    def check(actual, expected):
        actual, expected = (np.asarray(leaf, np.float64) for leaf in (actual, expected))
        largest = np.max(np.abs(expected), initial=0.1)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * largest)

    jax.tree.map(check, actual, expected)


RUNS = [
    *((signal, "replicated, Explicit") for signal in SIGNALS),
    *((signal, "fsdp, Auto") for signal in SIGNALS if signal != "every"),
    ("encoder", "replicated, Auto"),
    ("aggregator", "fsdp, Explicit"),
]


@pytest.mark.parametrize(("signal", "layout"), RUNS)
def test_train_steps_give_what_one_device_gives(signal, layout):
    axis_type, rule = LAYOUTS[layout]
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        batch = put(BATCH, mesh, spread)
        step, state = start(signal, put(PARAMS, mesh, rule), batch)
        initial = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        masks = put(MASKS, mesh, whole)
        history, state = follow(step, state, batch, masks)
    assert_same((history, state), on_one_device(signal))

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(check, state.params, initial)
    if layout == "fsdp, Auto":  # what is kept of every parameter is spread as it is
        inner = state.weighting_state.inner
        kept = {"aggregator": "smoothed", "task gradients": "squares"}.get(signal)
        assert not (kept and getattr(inner, kept)["encoder"]["mix"].is_fully_replicated)


@pytest.mark.parametrize("signal", SIGNALS)
def test_train_steps_in_shard_map_give_what_one_device_gives(signal):
    mesh = make_mesh()
    step, state = start(signal, PARAMS, BATCH, global_heads, "data")
    spread_step = jax.jit(
        jax.shard_map(
            lambda state, batch, mask: step(state, batch, mask=mask),
            mesh=mesh,
            in_specs=(P(), P("data"), P()),
            out_specs=P(),
        )
    )
    found = follow(
        lambda state, batch, mask: spread_step(state, batch, mask),
        put(state, mesh, whole),
        put(BATCH, mesh, spread),
        put(MASKS, mesh, whole),
    )
    assert_same(found, on_one_device(signal))


@pytest.mark.parametrize("signal", ["losses", "representation", "task gradients", "aggregator"])
def test_a_state_begins_the_same_inside_and_outside_of_shard_map(signal):
    """Where the losses sum over an axis that is known inside only."""
    step, outside = start(signal, PARAMS, BATCH, global_heads, "data")
    mesh = make_mesh(AxisType.Auto)
    inside = jax.shard_map(step.init, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    for init in (inside, step.init):
        state = jax.jit(init)(PARAMS, BATCH)
        assert jax.tree.structure(state) == jax.tree.structure(outside)
        jax.tree.map(np.testing.assert_array_equal, state, outside)


# Rows


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows."""

    def update(losses, state, present, steps, gramian):
        return jnp.sum(gramian, axis=1), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


def gathered(params):
    """The whole parameters, of which each device of a shard_map has a part."""
    kernel = jax.lax.all_gather(params["encoder"]["kernel"], "data", tiled=True)
    mix = jax.lax.all_gather(params["encoder"]["mix"], "data", axis=2, tiled=True)
    return params | {"encoder": params["encoder"] | {"kernel": kernel, "mix": mix}}


PARTS = jax.tree.map(lambda _: P(), PARAMS)
PARTS["encoder"] |= {"kernel": P("data"), "mix": P(None, None, "data")}


ROW_SUMS = row_sums()


@functools.cache
def rows_on_one_device(tasks):
    params, batch = make_params(tasks), make_batch(tasks)
    gradient_fn = mtl_jax.value_and_grad(losses_of, ROW_SUMS)
    return jax.device_get(
        jax.jit(gradient_fn.update)(params, gradient_fn.init(params, batch), batch)
    )


@pytest.mark.parametrize("rows", ["unrolled", "map", "vmap", "low_memory", 2, 3])
def test_rows_however_the_parameters_are_spread(rows):
    tasks = SEVEN if isinstance(rows, int) else TASKS
    params, batch, expected = make_params(tasks), make_batch(tasks), rows_on_one_device(tasks)
    gradient_fn = mtl_jax.value_and_grad(losses_of, ROW_SUMS, rows=rows)
    state = gradient_fn.init(params, batch)
    for layout in ("fsdp, Explicit", "fsdp, Auto"):
        axis_type, rule = LAYOUTS[layout]
        mesh = make_mesh(axis_type)
        with jax.set_mesh(mesh):
            update = jax.jit(gradient_fn.update)
            found = update(put(params, mesh, rule), state, put(batch, mesh, spread))
        assert_same(found, expected)

    gradient_fn = mtl_jax.value_and_grad(
        lambda params, batch: losses_of(gathered(params), batch, global_heads),
        ROW_SUMS,
        rows=rows,
        axis_name="data",
    )
    parts = PARTS | {"heads": dict.fromkeys(tasks, P())}
    in_parts = jax.shard_map(
        gradient_fn.update,
        mesh=make_mesh(AxisType.Auto),
        in_specs=(parts, P(), P("data")),
        out_specs=(P(), parts, P()),
    )
    assert_same(jax.jit(in_parts)(params, state, batch), expected)


def test_rows_are_not_batched_where_xla_would_gather_the_batch(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = {
        axis_type: choose_rows("auto", 3, put(PARAMS, make_mesh(axis_type), whole))
        for axis_type in (AxisType.Auto, AxisType.Explicit)
    }
    assert chosen == {AxisType.Auto: "unrolled", AxisType.Explicit: "vmap"}
    assert choose_rows("auto", 3, PARAMS) == "vmap"
    assert choose_rows("vmap", 3, put(PARAMS, make_mesh(AxisType.Auto), whole)) == "vmap"


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_a_gramian_sends_nothing_but_itself(axis_type, axis):
    """Whatever axis of a parameter is spread; a matrix of the rows would be gathered."""
    mesh = make_mesh(axis_type)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 16, 24)), jnp.float32)
    placed = put(rows, mesh, lambda _: P(*[None] * axis, "data"))
    compiled = jax.jit(lambda rows: gramian_of([rows])).lower(placed).compile()
    assert collectives(compiled.as_text()) == {Collective("all-reduce", 4 * 5 * 5): 1}
    matrix = np.asarray(rows, np.float64).reshape(5, -1)
    np.testing.assert_allclose(compiled(placed), matrix @ matrix.T, rtol=1e-5, atol=1e-3)


# Errors in shard_map


def part_of(params):
    """What a device has of parameters that lie as in `PARTS`."""
    encoder = params["encoder"]
    own = {"kernel": encoder["kernel"][:1], "mix": encoder["mix"][:, :, :1]}
    return params | {"encoder": encoder | own}


def spread_call(transform_, weighting, params=PARAMS, spec=None, **options):
    spec = P() if spec is None else spec
    if isinstance(weighting, mtl_jax.Aggregator):
        state = weighting.init(params, dict.fromkeys(TASKS, 0.0))
    else:
        own = params if spec == P() else part_of(params)
        state = weighting.init(dict.fromkeys(TASKS, 0.0), params=own)
    fn = jax.shard_map(
        transform_.update,
        mesh=make_mesh(AxisType.Auto),
        in_specs=(spec, P(), P("data")),
        out_specs=(P(), spec, P()),
        **options,
    )
    return jax.eval_shape(fn, params, state, BATCH)


def at_representation(weighting, heads=global_heads, axis_name="data"):
    options = {"gramian": "representation"}
    return transform(weighting, options, heads=heads, axis_name=axis_name)


@pytest.mark.parametrize("axis_name", ["data", None])
def test_untracked_axes_are_refused(axis_name):
    weighting = inverse_norms()
    for fn in (
        at_representation(weighting, axis_name=axis_name),
        transform(weighting, {}, heads=global_heads, axis_name=axis_name),
    ):
        with pytest.raises(ValueError, match="leave check_vma at its default, True"):
            spread_call(fn, weighting, check_vma=False)
    spread_call(at_representation(weighting), weighting)


@pytest.mark.parametrize("named", [{}, {"axis_name": "data"}])
def test_pmap_is_refused_with_what_to_do_instead(named):
    gradient = transform(inverse_norms(), {})
    replicas = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), PARAMS)
    mapped = jax.pmap(gradient.update, in_axes=(0, None, None), **named)
    says = "Instead of jax.pmap, spread the batch.*jax.jit; or.*independent replicas.*jax.vmap"
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(mapped, replicas, gradient.init(PARAMS, BATCH), BATCH)


@pytest.mark.parametrize("signal", ["every", "parameters"])
def test_independent_replicas_by_vmap_spread_over_the_devices(signal):
    """What is said to be done instead of pmap: each is trained as if it were alone."""
    step, one = start(signal, PARAMS, BATCH)
    mesh = make_mesh(AxisType.Auto)
    states = jax.tree.map(lambda leaf: np.stack([leaf] * 8), one)
    states = put(states, mesh, lambda leaf: P("data"))
    many = jax.jit(jax.vmap(lambda state, mask: step(state, BATCH, mask=mask), in_axes=(0, None)))
    for mask in MASKS:
        states, _ = many(states, mask)
    kernel = states.params["encoder"]["kernel"]
    assert not kernel.is_fully_replicated
    _, expected = on_one_device(signal)
    for replica in (0, 7):
        found = jax.tree.map(lambda leaf: leaf[replica], jax.device_get(states))  # noqa: B023
        assert_same(found, expected)


@pytest.mark.parametrize("weighting", [inverse_norms(), mtl_jax.every(inverse_norms(), 2)])
def test_an_axis_that_is_not_named(weighting):
    with pytest.raises(ValueError, match="The Gramian differs.*along 'data'.*as `axis_name`"):
        spread_call(at_representation(weighting, axis_name=None), weighting)
    # The gradients of replicated parameters are summed by JAX.
    spread_call(transform(weighting, {}, heads=global_heads), weighting)


def test_an_axis_that_is_not_there():
    weighting = inverse_norms()
    with pytest.raises(ValueError, match="'model' is not an axis.*axes are \\('data',\\)"):
        spread_call(at_representation(weighting, axis_name=("data", "model")), weighting)
    state = weighting.init(dict.fromkeys(TASKS, 0.0))
    with pytest.raises(ValueError, match="Under jit alone leave `axis_name` out"):
        at_representation(weighting)(PARAMS, state, BATCH)


@pytest.mark.parametrize("make", [mtl_jax.equal, inverse_norms])
@pytest.mark.parametrize("axis_name", ["data", None])
def test_losses_of_a_device_alone_are_refused(make, axis_name):
    weighting = make()
    for fn in (
        at_representation(weighting, heads, axis_name),
        transform(weighting, {}, axis_name=axis_name),
    ):
        with pytest.raises(ValueError, match=r"The loss 'a' differs.*jax.lax.pmean\(loss, 'data'"):
            spread_call(fn, weighting)


@pytest.mark.parametrize("make", [lambda: mtl_jax.trimmed_mean(1), mtl_jax.excess_mtl])
def test_what_reads_task_gradients_needs_whole_ones(make):
    def losses_fn(params, batch):
        return losses_of(gathered(params), batch, global_heads)

    weighting = make()
    fn = mtl_jax.value_and_grad(losses_fn, weighting, axis_name="data")
    with pytest.raises(ValueError, match="A parameter differs.*Task gradients must be whole"):
        spread_call(fn, weighting, spec=PARTS)
