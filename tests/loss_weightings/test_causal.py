import numpy as np
import pytest

import mtl_jax

NAMES = ("d", "a", "c", "b")


@pytest.mark.parametrize("tolerance", [0.01, 1.0, 5.0])
def test_definition(tolerance, x64):
    """The authors' code: exp(-tolerance M l), with M the strict lower triangle of ones."""
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 2, 4)
    of_names = dict(zip(NAMES, losses, strict=True))  # whose keys JAX sorts
    weighting = mtl_jax.causal(NAMES, tolerance)
    state = weighting.init(of_names)
    present = dict.fromkeys(NAMES, True)
    for absent in (None, "a", "d"):
        there = np.array([name != absent for name in NAMES])
        mask = present | ({} if absent is None else {absent: False})
        weights, state = weighting.update(of_names, state, mask=mask)
        expected = there * np.exp(-tolerance * np.tril(np.ones((4, 4)), -1) @ (there * losses))
        np.testing.assert_allclose([weights[name] for name in NAMES], expected, rtol=1e-12)


def test_without_names_the_order_is_that_of_the_losses():
    losses = [0.5, (1.0, 0.25)]
    weighting = mtl_jax.causal(None)
    weights, _ = weighting.update(losses, weighting.init(losses))
    first, (second, third) = weights
    np.testing.assert_allclose([first, second, third], np.exp([0, -0.5, -1.5]), rtol=1e-6)
    named = mtl_jax.causal(["1/1", "0", "1/0"])
    weights, _ = named.update(losses, named.init(losses))
    first, (second, third) = weights
    np.testing.assert_allclose([first, second, third], np.exp([-0.25, -0.75, 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("order", "error", "says"),
    [
        ("ab", TypeError, "`order` must be a sequence of the tasks' names, got 'ab'"),
        ({"a", "b"}, TypeError, "must be a sequence"),
        ((0, 1), TypeError, r"must be a sequence.*\(0, 1\)"),
        (("a",), ValueError, "must name each of the tasks a, b once; got a."),
        (("a", "a"), ValueError, "once; got a, a."),
        (("a", "b", "c"), ValueError, "once; got a, b, c."),
    ],
)
def test_an_order_of_other_tasks(order, error, says):
    with pytest.raises(error, match=f"causal: .*{says}"):
        mtl_jax.causal(order).init({"a": 1.0, "b": 1.0})
