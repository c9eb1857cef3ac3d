"""Weightings that learn a parameter of each task: what their optimizer is given, and which work."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

LOSSES = (np.float32(0.5), np.float32(4.0))
GRAMIAN = np.float32([[1.0, 0.5], [0.5, 9.0]])
NORMS = np.array([1.0, 3.0])
SGD = optax.sgd(0.05)


def log_total(s, losses, form):
    return {
        "kendall": np.exp(-s) * losses + s,
        "half": np.exp(-s) * losses / 2 + s / 2,
        "revised": np.exp(-s) * losses / 2 + np.log1p(np.exp(s)),
        "imtl_l": np.exp(s) * losses - s,
    }[form]


class Seen(NamedTuple):
    """What an optimizer was given; the functions at the parameter and a step away from it."""

    gradient: Any
    value: Any
    grad: Any
    values: Any
    grads: Any


def spy(step):
    """An optimizer that asks for everything, and always takes the same step."""

    def init(params):
        return Seen(params, params, params, (params, params, params, params), (params, params))

    def update(updates, state, params, *, value, grad, value_fn, grad_fn, obj_fn):
        points = (params, params + 0.5)
        values = tuple(fn(point) for fn in (value_fn, obj_fn) for point in points)
        grads = tuple(grad_fn(point, 0) for point in points)
        return jnp.full_like(updates, step), Seen(updates, value, grad, values, grads)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.cache
def after_two_steps(name, **options):
    """What was seen in the second step, in which the second task was absent."""
    weighting = getattr(mtl_jax, name)(spy(0.25), **options)
    state = weighting.init(LOSSES)
    for present in (True, False):
        _, state = weighting.update(
            LOSSES, state, mask=(np.True_, np.bool_(present)), gramian=GRAMIAN
        )
    return state.inner.opt_state


@pytest.mark.parametrize("form", ["kendall", "half", "revised", "imtl_l"])
def test_the_objective_of_each_task_is_its_term_of_the_total(form):
    own = form == "imtl_l"
    seen = after_two_steps("imtl_l") if own else after_two_steps("uncertainty", form=form)
    s = np.array([0.25, 0.0])  # the absent task has kept what it saw in the first step
    here, there = (log_total(point, np.array(LOSSES), form) for point in (s, s + 0.5))
    np.testing.assert_allclose(seen.value, here, rtol=1e-5)
    np.testing.assert_allclose(seen.values, [here, there] * 2, rtol=1e-5)
    slopes = [
        (log_total(point + 1e-6, np.array(LOSSES), form) - log_total(point - 1e-6, LOSSES, form))
        / 2e-6
        for point in (s, s + 0.5)
    ]
    np.testing.assert_allclose(seen.grads, slopes, rtol=1e-5, atol=1e-6)
    for gradient in (seen.gradient, seen.grad):
        np.testing.assert_array_equal(gradient, seen.grads[0])


def test_the_objective_of_gradnorm_is_its_distance_to_the_target():
    """Both tasks train alike, so that the target of each is the mean of the weighted norms."""
    weighting = mtl_jax.gradnorm(spy(0.25), alpha=1.0)
    _, state = weighting.update(LOSSES, weighting.init(LOSSES), gramian=GRAMIAN)
    seen = state.inner.opt_state
    for point, value, also in zip((1.0, 1.5), seen.values[:2], seen.values[2:], strict=True):
        np.testing.assert_allclose(value, np.abs(point * NORMS - 2), rtol=1e-6)
        np.testing.assert_array_equal(value, also)
    np.testing.assert_array_equal(seen.value, seen.values[0])
    np.testing.assert_allclose(seen.gradient, [-1, 3], rtol=1e-6)
    np.testing.assert_allclose(seen.grads, [[-1, 3], [-1, 3]], rtol=1e-6)


# All optimizers of optax by their name, those with other arguments than a learning rate below.
OPTIMIZERS = {
    "noisy_sgd": lambda: optax.noisy_sgd(0.05, key=jax.random.key(0)),
    "polyak_sgd": optax.polyak_sgd,
    "lbfgs": optax.lbfgs,
    "adadelta": lambda: optax.adadelta(50.0),
    "adafactor": lambda: optax.adafactor(0.5, multiply_by_parameter_scale=False),
    "fromage": lambda: optax.fromage(0.1, min_norm=1.0),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(estim_lr0=0.01),
    "prodigy": lambda: optax.contrib.prodigy(estim_lr0=0.01),
    "dog": lambda: optax.contrib.dog(init_step=("distance", 0.1)),
    "dowg": lambda: optax.contrib.dowg(init_estim_sq_dist=0.1),
    "schedule_free": lambda: optax.contrib.schedule_free(SGD, 0.05),
    "mechanize": lambda: optax.contrib.mechanize(SGD, s_init=0.1),
    "sam": lambda: optax.contrib.sam(SGD, optax.sgd(0.01)),
    "sam[opaque]": lambda: optax.contrib.sam(SGD, optax.sgd(0.01), opaque_mode=True),
    "reduce_on_plateau": lambda: optax.chain(SGD, optax.contrib.reduce_on_plateau()),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
    "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)),
    "MultiSteps": lambda: optax.MultiSteps(SGD, 2).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "apply_if_finite": lambda: optax.apply_if_finite(SGD, 3),
}
DEPRECATED = ("optimistic_adam",)
# Those that optax itself cannot apply to one number, or to one gradient.
REFUSED = {
    "sm3": lambda: optax.sm3(0.05),
    "lookahead": lambda: optax.lookahead(SGD, 5, 0.5),
    "dpsgd": lambda: optax.chain(
        optax.contrib.differentially_private_aggregate(1.0, 1.0, jax.random.key(0)), SGD
    ),
}
for module in (optax, optax.contrib):
    for name, function in vars(module).items():
        alias = inspect.isfunction(function) and not name.startswith(("_", "scale_by_"))
        if alias and "learning_rate" in inspect.signature(function).parameters:
            OPTIMIZERS.setdefault(name, functools.partial(function, 0.05))
OPTIMIZERS = {
    name: make for name, make in OPTIMIZERS.items() if name not in {*REFUSED, *DEPRECATED}
}
EXTRA = ("polyak_sgd", "lbfgs", "sam[opaque]", "reduce_on_plateau", "backtracking", "sophia")


def totals(name, optimizer, steps=15):
    """What is learned, as a distance to its optimum, before and after some steps."""
    weighting = getattr(mtl_jax, name)(optimizer)
    state = weighting.init(LOSSES)
    found = []
    for _ in range(steps):
        weights, state = weighting.update(LOSSES, state, gramian=GRAMIAN)
        if name == "gradnorm":
            found.append(abs(weights[0] - 3 * weights[1]))  # of equal weighted norms
        else:
            products = np.array(weights) * np.array(LOSSES)
            found.append(np.sum(products - 1 - np.log(products)))
    np.testing.assert_array_equal(state.steps, steps)
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    found = totals("uncertainty", OPTIMIZERS[name]())
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize("name", EXTRA)
@pytest.mark.parametrize("weighting", ["imtl_l", "gradnorm"])
def test_those_that_ask_for_more_than_the_gradient(weighting, name):
    found = totals(weighting, OPTIMIZERS[name]())
    assert found[-1] < 0.9 * found[0]


def test_line_searches_find_the_optimum_at_once():
    """A loss of its inverse as the weight, and gradients of equal weighted norms."""
    assert totals("uncertainty", optax.lbfgs())[-1] < 1e-5
    assert totals("gradnorm", optax.polyak_sgd())[-1] < 1e-5


def needs_a_hessian():
    def update(updates, state, params=None, *, hessian, **extra):
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize("make", [mtl_jax.uncertainty, mtl_jax.imtl_l, mtl_jax.gradnorm])
def test_what_cannot_be_served_is_refused_when_it_is_made(make):
    says = f"{make.__name__}: `optimizer` cannot learn one number for each task"
    for refused in REFUSED.values():
        with pytest.raises(TypeError, match=says):
            make(refused())
    for needing in (needs_a_hessian(), optax.chain(SGD, needs_a_hessian())):
        with pytest.raises(TypeError, match=f"{says}.* needs the argument 'hessian'.*value_fn"):
            make(needing)
    with pytest.raises(TypeError, match="`optimizer` must be an optax optimizer"):
        make(optax.adam)
