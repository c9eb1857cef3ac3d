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
from experiments.hlo import Collective, collectives
from mtl_jax._jacobian import choose_rows, gramian_of

TASKS = ("a", "b", "c")
MASKS = [{task: np.array(task != absent) for task in TASKS} for absent in (None, "b", None)]


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 3 + len(TASKS)))
    return {
        "encoder": {
            "kernel": jax.random.normal(next(keys), (8, 16)) / 3,
            "bias": jax.random.normal(next(keys), (16,)) / 3,
            "mix": jax.random.normal(next(keys), (2, 16, 8)) / 4,
        },
        "heads": {task: jax.random.normal(next(keys), (8,)) for task in TASKS},
    }


def make_batch():
    x, y, seen = jax.random.split(jax.random.key(1), 3)
    y, seen = jax.random.normal(y, (3, 16)), jax.random.bernoulli(seen, 0.6, (3, 16))
    batch = {"x": jax.random.normal(x, (16, 8))}
    return batch | {task: (y[k], seen[k]) for k, task in enumerate(TASKS)}


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

    return {task: loss(task) for task in TASKS}


def global_mean(values, present):
    """The masked mean over the whole batch, of which each device has a part."""
    total = jax.lax.psum(jnp.sum(jnp.where(present, values, 0)), "data")
    return total / jnp.maximum(jax.lax.psum(jnp.sum(present, dtype=values.dtype), "data"), 1)


global_heads = functools.partial(heads, mean=global_mean)


def losses_of(params, batch, heads=heads):
    return heads(params, dict.fromkeys(TASKS, encoder(params, batch)), batch)


def in_encoder(path):
    return path.startswith("encoder/")


# One weighting of each signal, and in what form it gets it.
SIGNALS = {
    "losses": (mtl_jax.adaptive, {}),
    "losses after the step": (mtl_jax.famo, {}),
    "representation": (mtl_jax.upgrad, {"gramian": "representation"}),
    "encoder": (mtl_jax.imtl_g, {"gramian": "encoder", "shared": in_encoder}),
    "parameters": (mtl_jax.conflict_free, {"diagnostics": True}),
    "every": (lambda: mtl_jax.every(mtl_jax.imtl_g(), 2), {"gramian": "representation"}),
    "task gradients": (mtl_jax.db_mtl, {"shared": in_encoder}),
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


def start(signal, params, heads=heads, axis_name=None):
    make, options = SIGNALS[signal]
    weighting, optimizer = make(), optax.sgd(0.05, momentum=0.9)
    state = mtl_jax.TrainState.create(
        params, optimizer, weighting, dict.fromkeys(TASKS, 0.0), shared=options.get("shared")
    )
    step = mtl_jax.make_train_step(
        transform(weighting, options, heads=heads, axis_name=axis_name),
        optimizer,
        weighting,
        losses_fn=functools.partial(losses_of, heads=heads),
    )
    return step, state


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
    step, state = start(signal, PARAMS)
    return jax.device_get(follow(step, state, BATCH, MASKS))


def assert_same(actual, expected):
    """Equal to 1e-5 of a leaf's largest entry; a solver's residual is rounding and nothing else."""

    def check(actual, expected):
        largest = np.max(np.abs(expected), initial=0.1)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * largest)

    jax.tree.map(check, actual, expected)


RUNS = [
    *((signal, "replicated, Explicit") for signal in SIGNALS),
    *((signal, "fsdp, Auto") for signal in SIGNALS if signal != "every"),
    ("encoder", "replicated, Auto"),
    ("task gradients", "fsdp, Explicit"),
]


@pytest.mark.parametrize(("signal", "layout"), RUNS)
def test_train_steps_give_what_one_device_gives(signal, layout):
    axis_type, rule = LAYOUTS[layout]
    mesh = make_mesh(axis_type)
    with jax.set_mesh(mesh):
        step, state = start(signal, put(PARAMS, mesh, rule))
        initial = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        masks = put(MASKS, mesh, whole)
        history, state = follow(step, state, put(BATCH, mesh, spread), masks)
    assert_same((history, state), on_one_device(signal))

    def check(leaf, sharding):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)

    jax.tree.map(check, state.params, initial)
    if signal == "task gradients" and layout == "fsdp, Auto":
        assert not state.weighting_state.inner.smoothed["encoder"]["mix"].is_fully_replicated


@pytest.mark.parametrize("signal", SIGNALS)
def test_train_steps_in_shard_map_give_what_one_device_gives(signal):
    mesh = make_mesh()
    step, state = start(signal, PARAMS, global_heads, "data")
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


@pytest.mark.parametrize("rows", ["unrolled", "map", "vmap", "low_memory"])
def test_rows_however_the_parameters_are_spread(rows):
    weighting = row_sums()
    state = weighting.init(dict.fromkeys(TASKS, 0.0))
    expected = jax.jit(mtl_jax.value_and_grad(losses_of, weighting, rows=rows))(
        PARAMS, state, BATCH
    )
    for layout in ("fsdp, Explicit", "fsdp, Auto"):
        axis_type, rule = LAYOUTS[layout]
        mesh = make_mesh(axis_type)
        with jax.set_mesh(mesh):
            gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_of, weighting, rows=rows))
            found = gradient_fn(put(PARAMS, mesh, rule), state, put(BATCH, mesh, spread))
        assert_same(found, expected)

    gradient_fn = mtl_jax.value_and_grad(
        lambda params, batch: losses_of(gathered(params), batch, global_heads),
        weighting,
        rows=rows,
        axis_name="data",
    )
    in_parts = jax.shard_map(
        gradient_fn,
        mesh=make_mesh(AxisType.Auto),
        in_specs=(PARTS, P(), P("data")),
        out_specs=(P(), PARTS, P()),
    )
    assert_same(jax.jit(in_parts)(PARAMS, state, BATCH), expected)


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


def spread_call(transform_, weighting, params=PARAMS, spec=None, **options):
    spec = P() if spec is None else spec
    if isinstance(weighting, mtl_jax.Aggregator):
        state = weighting.init(params, dict.fromkeys(TASKS, 0.0))
    else:
        state = weighting.init(dict.fromkeys(TASKS, 0.0))
    fn = jax.shard_map(
        transform_,
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
    weighting = mtl_jax.mgda()
    for fn in (
        at_representation(weighting, axis_name=axis_name),
        transform(weighting, {}, heads=global_heads, axis_name=axis_name),
    ):
        with pytest.raises(ValueError, match="Leave check_vma at its default, True"):
            spread_call(fn, weighting, check_vma=False)
    spread_call(at_representation(weighting), weighting)


@pytest.mark.parametrize("make", [mtl_jax.mgda, lambda: mtl_jax.every(mtl_jax.mgda(), 2)])
def test_an_axis_that_is_not_named(make):
    weighting = make()
    with pytest.raises(ValueError, match="Gramian differs.*along 'data'.*as `axis_name`"):
        spread_call(at_representation(weighting, axis_name=None), weighting)
    # The gradients of replicated parameters are summed by JAX.
    spread_call(transform(weighting, {}, heads=global_heads), weighting)


def test_an_axis_that_is_not_there():
    weighting = mtl_jax.mgda()
    with pytest.raises(ValueError, match="'model' is not an axis.*axes are \\('data',\\)"):
        spread_call(at_representation(weighting, axis_name=("data", "model")), weighting)
    state = weighting.init(dict.fromkeys(TASKS, 0.0))
    with pytest.raises(ValueError, match="Under jit alone leave `axis_name` out"):
        at_representation(weighting)(PARAMS, state, BATCH)


@pytest.mark.parametrize("make", [mtl_jax.equal, mtl_jax.mgda])
@pytest.mark.parametrize("axis_name", ["data", None])
def test_losses_of_a_device_alone_are_refused(make, axis_name):
    weighting = make()
    for fn in (
        at_representation(weighting, heads, axis_name),
        transform(weighting, {}, axis_name=axis_name),
    ):
        with pytest.raises(ValueError, match=r"The loss 'a' differs.*jax.lax.pmean\(loss, 'data'"):
            spread_call(fn, weighting)


def test_an_aggregator_needs_whole_gradients():
    aggregator = mtl_jax.trimmed_mean(1)

    def losses_fn(params, batch):
        return losses_of(gathered(params), batch, global_heads)

    fn = mtl_jax.value_and_grad(losses_fn, aggregator, axis_name="data")
    with pytest.raises(ValueError, match="An aggregator needs whole gradients"):
        spread_call(fn, aggregator, spec=PARTS)
