"""Reading losses and masks: what is accepted, and what the errors say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax._tasks import read_mask, read_tasks

ADAPTIVE, EQUAL, FAMO = mtl_jax.adaptive(), mtl_jax.equal(), mtl_jax.famo()


def test_names_dtype_and_number():
    tasks = read_tasks({"heads": [1.0, jnp.bfloat16(2)], "depth": jnp.float16(1)})
    assert tasks.names == ("depth", "heads/0", "heads/1")
    assert tasks.number == 3
    assert tasks.dtype == jnp.float32
    assert tasks.full(2.0).shape == (3,)
    assert tasks.full(2.0).dtype == jnp.float32


@pytest.mark.parametrize(
    "loss",
    [1.5, np.float32(1.5), np.float64(1.5), np.array(1.5), jnp.array(1.5), jnp.bfloat16(1.5)],
    ids=lambda loss: type(loss).__name__,
)
def test_python_numpy_and_jax_floats_are_losses(loss):
    weighting = ADAPTIVE
    state = weighting.init({"a": loss, "b": loss})
    weights, _ = weighting.update({"a": loss, "b": 3 * loss}, state)
    np.testing.assert_allclose([weights["a"], weights["b"]], [0.5, 1.5], rtol=1e-6)


def test_shapes_are_enough_for_init():
    shapes = {"a": jax.ShapeDtypeStruct((), jnp.float32), "b": np.float32(0)}
    state = mtl_jax.adaptive().init(shapes)
    np.testing.assert_array_equal(state.steps, [0, 0])


def test_one_loss_that_is_no_container():
    weighting = EQUAL
    weights, _ = weighting.update(jnp.float32(2), weighting.init(jnp.float32(2)))
    assert weights == 1


def test_float64_under_x64(x64):
    assert read_tasks((1.0, jnp.float32(1))).dtype == jnp.float64
    assert read_tasks((jnp.bfloat16(1), jnp.float32(1))).dtype == jnp.float32


@pytest.mark.parametrize("call", ["init", "update"])
@pytest.mark.parametrize(
    ("loss", "error", "says"),
    [
        (jnp.ones((4, 2)), ValueError, r"'heads/0' has shape \(4, 2\).*masked_mean"),
        (jnp.ones((1, 1)), ValueError, r"'heads/0' has shape \(1, 1\)"),
        (jnp.int32(1), TypeError, "'heads/0' has dtype int32"),
        (1, TypeError, "'heads/0' has dtype int"),
        (jnp.array(True), TypeError, "'heads/0' has dtype bool"),
        (True, TypeError, "'heads/0' has dtype bool"),
        (jnp.complex64(1), TypeError, "'heads/0' has dtype complex64"),
        (jax.ShapeDtypeStruct((2, 2), jnp.float32), ValueError, r"'heads/0' has shape \(2, 2\)"),
        (jax.ShapeDtypeStruct((), jnp.int32), TypeError, "'heads/0' has dtype int32"),
    ],
)
def test_a_loss_that_is_not_a_real_scalar_is_named(loss, error, says, call):
    weighting = EQUAL
    bad = {"a": 1.0, "heads": [loss]}
    with pytest.raises(error, match=says):
        if call == "init":
            weighting.init(bad)
        else:
            weighting.update(bad, weighting.init({"a": 1.0, "heads": [1.0]}))


def test_something_that_is_no_number_is_named():
    with pytest.raises(TypeError, match="'a'"):
        mtl_jax.equal().init({"a": "high"})


@pytest.mark.parametrize("empty", [{}, (), [], None, {"a": {}}])
def test_no_losses(empty):
    with pytest.raises(ValueError, match="There are no losses"):
        mtl_jax.equal().init(empty)


def test_errors_are_raised_while_tracing():
    weighting = EQUAL
    state = weighting.init({"a": 1.0})
    with pytest.raises(ValueError, match="'a' has shape"):
        jax.eval_shape(weighting.update, {"a": jax.ShapeDtypeStruct((3, 3), jnp.float32)}, state)


@pytest.mark.parametrize("call", ["update", "observe"])
def test_another_number_of_tasks_than_at_init(call):
    weighting = FAMO
    state = weighting.init({"a": 1.0, "b": 1.0})
    losses = {"a": 1.0, "b": 1.0, "c": 1.0}
    with pytest.raises(ValueError, match="for 2 tasks, but there are losses for 3: a, b, c.*init"):
        if call == "update":
            weighting.update(losses, state)
        else:
            weighting.observe(losses, state)


ROWS = np.eye(2, 3, dtype=np.float32)
OF_DEPTH_AND_NORMALS = {"depth": 1.0, "normals": 2.0}
OF_AUX_AND_DEPTH = {"aux": 1.0, "depth": 2.0}
METHODS_OF_EACH_KIND = {
    "dwa": (mtl_jax.dwa(1), {}),
    "mgda": (mtl_jax.mgda(), {"gramian": ROWS @ ROWS.T}),
    "excess_mtl": (mtl_jax.excess_mtl(), {"task_gradients": ROWS}),
    "ema": (mtl_jax.ema(mtl_jax.dwa(1), 0.5), {}),
}
NAMES_BOTH = r"\{'depth': \*, 'normals': \*\}, the losses are \{'aux': \*, 'depth': \*\}"


@pytest.mark.parametrize("name", METHODS_OF_EACH_KIND)
def test_a_state_of_other_tasks_of_the_same_number_is_refused(name):
    weighting, signal = METHODS_OF_EACH_KIND[name]
    state = weighting.init(OF_DEPTH_AND_NORMALS, params=ROWS[0])
    with pytest.raises(ValueError, match=NAMES_BOTH):
        weighting.update(OF_AUX_AND_DEPTH, state, **signal)
    # And so it is in a compiled step, which knows them when it is traced.
    step = jax.jit(lambda losses, state: weighting.update(losses, state, **signal))
    with pytest.raises(ValueError, match=NAMES_BOTH):
        step(OF_AUX_AND_DEPTH, state)


def test_every_function_refuses_the_state_of_other_tasks():
    state = FAMO.init(OF_DEPTH_AND_NORMALS)
    with pytest.raises(ValueError, match=NAMES_BOTH):
        FAMO.observe(OF_AUX_AND_DEPTH, state)
    aggregator = mtl_jax.moco()
    state = aggregator.init(ROWS[0], OF_DEPTH_AND_NORMALS)
    with pytest.raises(ValueError, match=NAMES_BOTH):
        aggregator.update(ROWS, state, losses=OF_AUX_AND_DEPTH)


@pytest.mark.parametrize("state", [None, (), {"steps": 0}, jnp.zeros(2)])
def test_a_state_that_is_not_ours(state):
    weighting = EQUAL
    with pytest.raises(TypeError, match="state that this weighting's `init` returned"):
        weighting.update({"a": 1.0, "b": 1.0}, state)


def test_a_state_of_another_weighting_is_told_by_its_leaves():
    losses = {"a": 1.0, "b": 1.0}
    plain, averaged = mtl_jax.dwa(2), mtl_jax.ema(mtl_jax.equal(), 0.9)
    says = (
        "lacks the leaf 'inner/total' and has an unknown leaf 'inner/inner/steps'. Pass the state"
    )
    with pytest.raises(ValueError, match=says):
        plain.update(losses, averaged.init(losses))
    with pytest.raises(ValueError, match="state has an unknown leaf 'inner/inner/steps'. Pass"):
        EQUAL.update(losses, averaged.init(losses))


LOSSES = {"a": 1.0, "heads": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        ({"a": True}, ValueError, r"\{'a': \*, 'heads': \[\*, \*\]\}; got \{'a': \*\}\."),
        (True, ValueError, r"\{'a': \*, 'heads': \[\*, \*\]\}; got \*\."),
        ({"a": True, "b": [True, True]}, ValueError, r"got \{'a': \*, 'b': \[\*, \*\]\}"),
        (jnp.array([True, False, True]), ValueError, "mask must have the structure of the losses"),
        ({"a": 1, "heads": [True, True]}, TypeError, r"leaf 'a'.*dtype int"),
        ({"a": True, "heads": [True, 1.0]}, TypeError, r"leaf 'heads/1'.*dtype float"),
        ({"a": True, "heads": [jnp.ones(4, bool), True]}, TypeError, r"'heads/0' has shape \(4,\)"),
    ],
)
def test_mask_errors(mask, error, says):
    weighting = EQUAL
    with pytest.raises(error, match=says):
        weighting.update(LOSSES, weighting.init(LOSSES), mask=mask)


def test_a_mask_that_differs_only_in_its_containers_is_told_so():
    """The names alone ("2 tasks (0, 1); got 2 tasks (0, 1)") would not show what is wrong."""
    weighting = EQUAL
    with pytest.raises(ValueError, match="mask") as error:
        weighting.update((1.0, 2.0), weighting.init((1.0, 2.0)), mask=[True, True])
    expected, got = str(error.value).split("got")
    assert got.strip(" .") not in expected


def test_constant_weights_that_differ_only_in_their_containers_are_told_so():
    with pytest.raises(ValueError, match="weights") as error:
        mtl_jax.constant([1.0, 2.0]).init((1.0, 2.0))
    expected, got = str(error.value).split("got")
    assert got.strip(" .") not in expected


@pytest.mark.parametrize("true", [True, np.True_, jnp.array(True)], ids=["python", "numpy", "jax"])
def test_masks_of_python_numpy_and_jax_booleans(true):
    weighting = EQUAL
    mask = {"a": true, "heads": [not true, true]}
    weights, _ = weighting.update(LOSSES, weighting.init(LOSSES), mask=mask)
    assert [float(weight) for weight in jax.tree.leaves(weights)] == [1, 0, 1]


def test_no_mask_is_everyone():
    np.testing.assert_array_equal(read_mask(None, read_tasks(LOSSES)), [True] * 3)


def test_a_parameter_given_for_other_tasks_names_both():
    with pytest.raises(
        ValueError, match=r"\{'a': \*, 'heads': \[\*, \*\]\}; got \{'a': \*, 'b': \*\}"
    ):
        mtl_jax.constant({"a": 1.0, "b": 1.0}).init(LOSSES)


def test_vector_weighting_refuses_a_state_without_the_tasks_in_front():
    weighting = mtl_jax.vector_weighting(
        lambda losses, state, present, steps: (losses, state),
        lambda tasks, key: {"history": jnp.zeros((7, tasks.number))},
    )
    with pytest.raises(TypeError, match=r"'history' has shape \(7, 2\).*tasks \(2\)"):
        weighting.init((1.0, 2.0))
