"""Random arguments: only errors that say what is wrong come out of the public functions.

Each function is called with arguments that fit, one of them then replaced, in whole or in a leaf,
by something random. It must return, or raise a ValueError or TypeError by a `raise` of mtl_jax:
what JAX, NumPy or Python say of their insides is no help to a user. The calls are traced, and not
compiled.
"""

import functools
import linecache
import pathlib
import traceback

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mtl_jax
from mtl_jax import solvers

pytestmark = [  # of NumPy and JAX, for lists like [1e30, np.float16(1)]
    pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Implicit conversion of an array:DeprecationWarning"),
]
LIBRARY = pathlib.Path(mtl_jax.__file__).parent
KEY = jax.random.key(0)
TASKS = ("a", "b", "c")
LOSSES = dict.fromkeys(TASKS, np.float32(1))
MASK = dict.fromkeys(TASKS, np.True_)
GRAMIAN = np.eye(3, dtype=np.float32)
PARAMS = {"encoder": np.ones((3, 2), np.float32), "heads": np.ones((3, 2), np.float32)}
ROWS = {name: np.ones((3, *leaf.shape), np.float32) for name, leaf in PARAMS.items()}
X = np.ones((4, 3), np.float32)


@pytest.fixture(autouse=True, scope="module")
def whole_tracebacks():
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


# What is drawn

LEAVES = [
    None, True, 0, -1, 3, 10**30, 0.0, 0.5, -2.5, 1e30, float("nan"), float("inf"), 1j,
    "encoder", b"x", object(),
    np.bool_(True), np.float16(1), np.float64(0.5), np.complex64(1), np.int8(2),
    np.array("x"), np.array(None), np.datetime64("2020"),
    np.ones(3), np.ones((3, 3), np.float32), np.ones((0,)), np.ones((3, 0)), np.zeros((2, 2), int),
    np.ones((3, 3, 2), bool), jnp.bfloat16(1), jnp.float16(0.5), jnp.ones(3, bool),
    jnp.ones((3, 2), jnp.complex64), jnp.arange(3), jnp.float32(2), KEY,
    jax.random.split(KEY, 3), jax.random.PRNGKey(0),
    jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32),
]  # fmt: skip
leaves = st.sampled_from(LEAVES)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from([*TASKS, "encoder", "x"]), inner, max_size=3),
    ),
    max_leaves=4,
)


@st.composite
def instead_of(draw, value):
    """Something else: any tree, or the value with a leaf replaced, dropped or cast."""
    parts, structure = jax.tree.flatten(value)
    if callable(value):
        returned = draw(trees)
        return draw(st.sampled_from([returned, lambda *args, **kwargs: returned]))
    if not parts or draw(st.booleans()):
        return draw(trees)
    k, part = draw(st.integers(0, len(parts) - 1)), None
    how = draw(st.sampled_from(["leaf", "tree", "cast", "shape"]))
    if how in ("leaf", "tree") or not hasattr(parts[k], "dtype"):
        part = draw(leaves if how == "leaf" else trees)
    elif how == "shape":
        part = np.ones(draw(st.lists(st.integers(0, 3), max_size=3)), np.float32)
    else:
        dtype = draw(st.sampled_from([int, bool, "float16", jnp.bfloat16, "complex64", object]))
        part = (
            parts[k]
            if jnp.issubdtype(parts[k].dtype, jax.dtypes.prng_key)
            else (np.asarray(parts[k]).astype(dtype))
        )
    return jax.tree.unflatten(structure, [*parts[:k], part, *parts[k + 1 :]])


def outcome(call):
    """What a call returned; `None` if it was refused in an orderly way."""
    try:
        return call()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [LIBRARY in pathlib.Path(frame.filename).parents for frame in frames]
        here = [frame.filename == __file__ for frame in frames]
        if any(ours) and any(here[ours.index(True) :]):
            return None  # a function that the library was given raised it
        line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
        orderly = isinstance(error, TypeError | ValueError) and line.startswith("raise")
        if ours[-1] and orderly and len(str(error)) > 20:
            return None
        raise


def traced(function, *args, **kwargs):
    return jax.eval_shape(lambda: function(*args, **kwargs))


def check(data, function, arguments):
    """Call the function with one of its arguments replaced."""
    name = data.draw(st.sampled_from(sorted(arguments)), label="argument")
    value = data.draw(instead_of(arguments[name]), label="value")
    return outcome(lambda: function(**(arguments | {name: value})))


def examples(number):
    """So many, the same ones every time, and as they are drawn: they are small already."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
    )


# Weightings and aggregators

WEIGHTINGS = methods.METHODS | methods.GRAMIAN_METHODS | {
    "excess_mtl": mtl_jax.excess_mtl,
    "lr_annealing": lambda: mtl_jax.lr_annealing(None),
    "ema of rows": lambda: mtl_jax.ema(mtl_jax.excess_mtl(), 0.5),
    "ema": lambda: mtl_jax.ema(mtl_jax.adaptive(), 0.5),
    "every": lambda: mtl_jax.every(mtl_jax.mgda(), 2),
    "logarithms": lambda: mtl_jax.log_losses(mtl_jax.famo()),
    "all": lambda: mtl_jax.clipped(mtl_jax.after_warmup(mtl_jax.famo(), 2), 0.1, 2.0),
    "preferred": lambda: mtl_jax.with_preference(mtl_jax.normalized(mtl_jax.equal()), LOSSES),
}  # fmt: skip


AGGREGATORS = {name: make for name, make in methods.ROW_METHODS.items() if name not in WEIGHTINGS}


@functools.cache
def weighting(name):
    made = WEIGHTINGS[name]()
    return made, made.init(LOSSES, key=KEY, params=PARAMS)


@functools.cache
def aggregator(name):
    made = AGGREGATORS[name]()
    return made, made.init(PARAMS, LOSSES, key=KEY)


@given(name=st.sampled_from(sorted(WEIGHTINGS)), data=st.data())
@examples(300)
def test_update_of_a_weighting(name, data):
    made, state = weighting(name)
    arguments = {"losses": LOSSES, "state": state, "mask": MASK}
    arguments |= {"gramian": GRAMIAN, "task_gradients": ROWS}
    found = check(data, functools.partial(traced, made.update), arguments)
    if found is not None:
        weights, after = found
        assert all(weight.shape == () for weight in jax.tree.leaves(weights))
        assert jax.tree.structure(after) == jax.tree.structure(state)
    if made.observe is not None:
        arguments = {"losses": LOSSES, "state": state, "mask": MASK}
        check(data, functools.partial(traced, made.observe), arguments)
    if made.due is not None:
        check(data, functools.partial(traced, made.due), {"state": state})


@given(name=st.sampled_from(sorted(WEIGHTINGS)), data=st.data())
@examples(150)
def test_init_of_a_weighting(name, data):
    made, _ = weighting(name)
    check(
        data, functools.partial(traced, made.init), {"losses": LOSSES, "key": KEY, "params": PARAMS}
    )


@given(data=st.data(), names=st.tuples(*[st.sampled_from(sorted(WEIGHTINGS))] * 2))
@examples(60)
def test_the_state_of_another_weighting(data, names):
    (made, _), (_, state) = weighting(names[0]), weighting(names[1])
    signals = {"gramian": GRAMIAN, "task_gradients": ROWS}
    outcome(lambda: traced(made.update, LOSSES, state, mask=MASK, **signals))


@given(name=st.sampled_from(sorted(AGGREGATORS)), data=st.data())
@examples(150)
def test_aggregators(name, data):
    made, state = aggregator(name)
    arguments = {"task_gradients": ROWS, "state": state, "losses": LOSSES, "mask": MASK}
    found = check(data, functools.partial(traced, made.update), arguments)
    if found is not None:
        assert jax.tree.structure(found[1]) == jax.tree.structure(state)
    arguments = {"params": PARAMS, "losses": LOSSES, "key": KEY}
    check(data, functools.partial(traced, made.init), arguments)
    name = data.draw(st.sampled_from(sorted(AGGREGATORS)))
    outcome(lambda: traced(made.update, ROWS, aggregator(name)[1], losses=LOSSES))


# Constructors

ADAM = optax.adam(0.1)
CONSTRUCTORS = [
    (mtl_jax.constant, {"weights": LOSSES}),
    (mtl_jax.adaptive, {"emphasis": 1.0, "rule": "softmax", "relative_to": None, "decay": 0.5}),
    (mtl_jax.adaptive, {"relative_to": "initial", "window": 2}),
    (mtl_jax.adaptive, {"relative_to": LOSSES}),
    (mtl_jax.adaptive, {"relative_to": lambda step: dict.fromkeys(TASKS, 1 / (1 + step))}),
    (mtl_jax.group_dro, {
        "step_size": 1.0, "reference": LOSSES, "normalize": True, "smoothing": 0.1,
    }),
    (mtl_jax.uw_so, {"temperature": 1.0}),
    (mtl_jax.go4align, {"groups": 2, "step_size": 0.1}),
    (mtl_jax.dwa, {"window": 2, "temperature": 1.0}),
    (mtl_jax.uncertainty, {"optimizer": ADAM, "initial_log_variance": 0.0, "form": "half"}),
    (mtl_jax.random_weighting, {"distribution": "normal"}),
    (mtl_jax.dynamic_task_prioritization, {"gamma": LOSSES, "performance": jnp.exp, "decay": 0.5}),
    (mtl_jax.dynamic_task_prioritization, {"gamma": 1.0, "performance": "metrics"}),
    (mtl_jax.achievement, {
        "single_task": LOSSES, "gamma": 1.0, "margin": 0.1, "decay": 0.5,
        "higher_is_better": dict.fromkeys(TASKS, False), "form": "arithmetic",
    }),
    (mtl_jax.causal, {"order": TASKS, "tolerance": 1.0}),
    (mtl_jax.cov_weighting, {"decay": 0.5}),
    (mtl_jax.softadapt, {"window": 1, "beta": 0.1, "order": 1, "variant": "normalized"}),
    (mtl_jax.relobralo, {"alpha": 0.9, "temperature": 1.0, "rho": 0.5}),
    (mtl_jax.imtl_l, {"optimizer": ADAM}),
    (mtl_jax.stch, {"warmup": 2, "mu": 1.0, "window": 1}),
    (mtl_jax.famo, {"learning_rate": 0.1, "weight_decay": 0.1, "min_losses": LOSSES}),
    (mtl_jax.gradnorm, {"optimizer": ADAM, "alpha": 1.0}),
    (mtl_jax.norm_balance, {"momentum": 0.5, "norm_of": "loss", "reference": None}),
    (mtl_jax.mgda, {"normalization": "l2"}),
    (mtl_jax.cagrad, {"c": 0.5, "rescale": None}),
    (mtl_jax.pcgrad, {"order": lambda key, number: np.tile(np.arange(number), (number, 1))}),
    (mtl_jax.gradvac, {"beta": 0.5, "order": lambda key, k: np.tile(np.arange(k), (k, 1))}),
    (mtl_jax.nash_mtl, {"max_norm": 1.0}),
    (mtl_jax.fair_grad, {"alpha": 1.0}),
    (mtl_jax.aligned_mtl, {"scale": "min", "preference": LOSSES}),
    (mtl_jax.conflict_free, {"preference": LOSSES}),
    (mtl_jax.upgrad, {"preference": LOSSES}),
    (mtl_jax.dual_proj, {"preference": LOSSES}),
    (mtl_jax.krum, {"byzantine": 0, "selected": 1, "distance": "plain"}),
    (mtl_jax.graddrop, {"leak": LOSSES}),
    (mtl_jax.trimmed_mean, {"trim": 1}),
    (mtl_jax.moco, {"beta": 0.5, "gamma": 0.1, "gamma_sigma": 0.5, "rho": 0.1, "eps": 0.0}),
    (mtl_jax.excess_mtl, {"step_size": 0.1, "eps": 0.0}),
    (mtl_jax.lr_annealing, {"reference": None, "alpha": 0.1, "statistic": "max"}),
    (mtl_jax.db_mtl, {"beta": 0.5, "beta_sigma": 0.1, "eps": 0.0}),
    (mtl_jax.modo, {"gamma": 0.1, "rho": 0.1}),
    (mtl_jax.auto_lambda, {
        "optimizer": ADAM, "learning_rate": 0.1, "primary": LOSSES, "initial": LOSSES,
    }),
    (mtl_jax.sdmgrad, {
        "regularization": 0.3, "learning_rate": 0.1, "momentum": 0.5, "iterations": 2,
        "preference": LOSSES, "eps": 0.0,
    }),
    (mtl_jax.every, {"weighting": mtl_jax.equal(), "steps": 2}),
    (mtl_jax.after_warmup, {"weighting": mtl_jax.equal(), "steps": 2}),
    (mtl_jax.ema, {"weighting": mtl_jax.equal(), "decay": 0.5, "initial": "first"}),
    (mtl_jax.ema, {"weighting": mtl_jax.equal(), "decay": 0.5, "initial": LOSSES}),
    (mtl_jax.clipped, {"weighting": mtl_jax.equal(), "low": 0.0, "high": 1.0}),
    (mtl_jax.normalized, {"weighting": mtl_jax.equal(), "total": 1.0}),
    (mtl_jax.with_preference, {"weighting": mtl_jax.equal(), "preference": LOSSES}),
    (mtl_jax.log_losses, {"weighting": mtl_jax.imtl_g(), "decide_on": "losses"}),
    (mtl_jax.vector_weighting, {
        "update": lambda losses, state, *_: (losses, state),
        "init": lambda tasks, key, params: (),
        "needs": mtl_jax.Signal.TASK_GRADIENTS,
        "due": lambda state: True,
    }),
    (mtl_jax.vector_weighting, {
        "update": lambda losses, state, *_: (losses, state),
        "init": lambda tasks, key: (),
        "observe": lambda losses, state, present: state,
        "needs": mtl_jax.Signal.GRAMIAN,
    }),
    (mtl_jax.vector_weighting, {
        "update": lambda losses, state, *_: (losses, state),
        "init": lambda tasks, key: (),
        "needs": mtl_jax.Signal.SECOND_BATCH,
        "directions": lambda state, present: (np.ones((2, present.size), np.float32), None),
    }),
    (mtl_jax.rows_aggregator, {
        "update": lambda rows, state, *_: (jax.tree.map(lambda row: row[0], rows), state),
        "init": lambda params, tasks, key: (),
        "reads_losses": True,
    }),
]  # fmt: skip


def use(made):
    """Run what a constructor made."""
    if isinstance(made, mtl_jax.Aggregator):
        state = traced(made.init, PARAMS, LOSSES, key=KEY)
        return jax.eval_shape(lambda state: made.update(ROWS, state, losses=LOSSES), state)

    def run():
        state = made.init(LOSSES, key=KEY, params=PARAMS)
        signals = {"gramian": GRAMIAN, "task_gradients": ROWS}
        if made.needs is mtl_jax.Signal.SECOND_BATCH:
            combinations, _ = made.method.directions(state, np.ones(len(TASKS), bool))
            signals["products"] = GRAMIAN[:, : len(combinations)]
        weights, state = made.update(LOSSES, state, mask=MASK, **signals)
        return weights, state if made.observe is None else made.observe(LOSSES, state)

    return jax.eval_shape(run)


@given(case=st.sampled_from(CONSTRUCTORS), data=st.data())
@examples(500)
def test_constructors(case, data):
    make, arguments = case
    check(data, lambda **kwargs: use(make(**kwargs)), arguments)


# Transforms


def losses_fn(params, x):
    z = jnp.tanh(x @ params["encoder"])
    return {
        task: jnp.mean((z @ head) ** 2) for task, head in zip(TASKS, params["heads"], strict=True)
    }


def encoder(params, x):
    return jnp.tanh(x @ params["encoder"])


def heads(params, zs, x):
    return {t: jnp.mean((zs[t] @ h) ** 2) for t, h in zip(TASKS, params["heads"], strict=True)}


def call(transform):
    """One step with what a transform makes, all its arguments in one."""

    def run(params, state, mask, **options):
        return jax.eval_shape(lambda: transform(**options)(params, state, X, mask=mask))

    return run


@given(name=st.sampled_from(["adaptive", "imtl_g", "every", "excess_mtl"]), data=st.data())
@examples(160)
def test_transforms_of_weightings(name, data):
    made, state = weighting(name)
    step = {"params": PARAMS, "state": state, "mask": MASK, "weighting": made}
    flags = {"has_aux": False, "rows": "unrolled", "diagnostics": True, "shared": None}
    arguments = step | flags | {"losses_fn": losses_fn}
    check(data, call(mtl_jax.value_and_grad), arguments)
    if made.needs is mtl_jax.Signal.TASK_GRADIENTS:
        return
    arguments = step | flags | {"encoder": encoder, "heads": heads, "tasks": TASKS}
    arguments |= {"head_gradient": "unweighted", "gramian": "encoder"}
    check(data, call(mtl_jax.representation_value_and_grad), arguments)
    arguments = {"heads": heads, "params": PARAMS, "z": jnp.ones((4, 2)), "tasks": TASKS}

    def check_heads(heads, params, z, tasks):
        mtl_jax.check_heads(heads, params, z, X, tasks=tasks)

    check(data, check_heads, arguments)


@given(data=st.data(), name=st.sampled_from(sorted(AGGREGATORS)), rows=st.sampled_from(["map", 2]))
@examples(40)
def test_transforms_of_aggregators(data, name, rows):
    made, state = aggregator(name)
    arguments = {"params": PARAMS, "state": state, "mask": MASK, "weighting": made}
    arguments |= {"losses_fn": losses_fn, "rows": rows, "shared": None}
    check(data, call(mtl_jax.value_and_grad), arguments)


@given(
    name=st.sampled_from(["adaptive", "famo", "pcgrad", "excess_mtl", "graddrop"]), data=st.data()
)
@examples(100)
def test_the_functions_of_a_gradient(name, data):
    made, _ = aggregator(name) if name in AGGREGATORS else weighting(name)
    gradient = mtl_jax.value_and_grad(losses_fn, made)
    state = gradient.init(PARAMS, X, key=KEY)

    def init(params, key):
        return traced(gradient.init, params, X, key=key)

    check(data, init, {"params": PARAMS, "key": KEY})
    check(data, lambda params: traced(gradient.losses, params, X), {"params": PARAMS})
    arguments = {"params": PARAMS, "state": state, "mask": MASK}

    def step(params, state, mask):
        return traced(gradient, params, state, X, mask=mask)

    check(data, step, arguments)
    if gradient.observe is not None:

        def observe(params, state, mask):
            return traced(gradient.observe, params, state, X, mask=mask)

        check(data, observe, arguments)


@given(data=st.data(), name=st.sampled_from(["imtl_g", "excess_mtl"]))
@examples(100)
def test_as_aggregator(data, name):
    made, _ = weighting(name)

    def run(params, updates, losses, mask, **options):
        combined = mtl_jax.as_aggregator(**options)

        def step():
            state = combined.init(params)
            return combined.update(updates, state, losses=losses, mask=mask)

        return jax.eval_shape(step)

    arguments = {"weighting": made, "num_tasks": 3, "key": KEY, "params": PARAMS}
    check(data, run, arguments | {"updates": ROWS, "losses": LOSSES, "mask": MASK})


@given(data=st.data())
@examples(100)
def test_the_train_step(data):
    made, _ = weighting("famo")

    def losses_of(params, *args):
        return losses_fn(params, args[-1])

    gradient = mtl_jax.value_and_grad(losses_of, made)

    def init(params, **options):
        step = mtl_jax.make_train_step(gradient, ADAM)
        return jax.eval_shape(lambda: step.init(params, X, **options))

    more = {"model_state": {"mean": X}, "rng": KEY, "weighting_key": KEY}
    check(data, init, {"params": PARAMS} | more)

    def run(params, mask, **options):
        step = mtl_jax.make_train_step(**options)
        state = jax.eval_shape(lambda: step.init(params, X))
        return jax.eval_shape(lambda state: step(state, X, mask=mask), state)

    options = {"gradient": gradient, "optimizer": ADAM, "donate": True}
    options |= {"params": PARAMS, "mask": MASK}
    name = data.draw(st.sampled_from(sorted(options)))
    value = data.draw(instead_of(options[name]))
    outcome(lambda: run(**(options | {name: value})))


# The rest


@given(data=st.data())
@examples(150)
def test_masked_mean(data):
    arguments = {"values": X, "present": np.ones(4, bool)}
    found = check(data, mtl_jax.masked_mean, arguments)
    if found is not None:
        assert found.shape == ()
        assert found.dtype == jnp.float32


@given(data=st.data())
@examples(150)
def test_with_metrics(data):
    _, state = weighting("achievement")
    arguments = {"state": state, "metrics": LOSSES}
    check(data, mtl_jax.with_metrics, arguments)


@given(data=st.data())
@examples(100)
def test_diagnostics(data):
    arguments = {"gramian": GRAMIAN, "present": np.ones(3, bool)}
    found = check(data, functools.partial(traced, mtl_jax.diagnostics), arguments)
    if found is not None:
        assert found.cosines.shape == found.magnitude_similarity.shape
        assert found.conflicting.shape == ()


SOLVERS = [
    (solvers.minimum_norm_point, {}),
    (solvers.dual_cone_projection, {"target": np.ones(3, np.float32)}),
    (solvers.maximin_in_ball, {"radius": 0.5}),
    (solvers.fair_point, {"alpha": 2.0}),
]


@given(case=st.sampled_from(SOLVERS), data=st.data())
@examples(200)
def test_solvers(case, data):
    solve, arguments = case
    arguments = arguments | {"gramian": GRAMIAN, "present": np.ones(3, bool)}
    found = check(data, functools.partial(traced, solve), arguments)
    if found is not None:
        assert found.x.ndim == 1
        assert found.residual.shape == ()
