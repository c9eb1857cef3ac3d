"""A physics-informed network: the terms of its loss are the tasks.

The Helmholtz equation u_xx + u_yy + u = f on the square, with u = 0 on its four sides. The network
u(x, y) is trained on how far it is from the equation and from 0 on each side; how much each of the
five counts is what weightings decide. First by Adam, at new points in every step; then by L-BFGS,
which wants one function: at fixed points, with the last weights. The exact solution is known, so
the weightings are compared by the error that counts, which none of them sees.

`experiments/problems/pde.py` has the equation at its full size, and others.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import mtl_jax

Params = list[dict[str, jax.Array]]
WEIGHTINGS = {
    "equal": mtl_jax.equal(),
    "relobralo": mtl_jax.relobralo(),
    "norm_balance": mtl_jax.norm_balance(norm_of="root_loss"),
    "conflict_free": mtl_jax.conflict_free(),
}
WAVES = (1, 2)
"""Half waves in each half of the two directions; (1, 4) in the papers, which takes more steps."""


def exact(z: jax.Array) -> jax.Array:
    """The solution at points, from which f follows."""
    return jnp.prod(jnp.sin(jnp.pi * z * jnp.array([WAVES])), axis=1)


def init(key: jax.Array, widths: tuple[int, ...] = (2, 32, 32, 1)) -> Params:
    """The layers of the network."""
    return [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros((n,))}
        for key, m, n in zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    ]


def u(params: Params, z: jax.Array) -> jax.Array:
    """The network at points, the rows of z."""
    z = z * 3**0.5  # of deviation 1
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return (z @ params[-1]["w"] + params[-1]["b"])[:, 0]


def second(params: Params, z: jax.Array, axis: int) -> jax.Array:
    """The second derivative of the network by x (0) or y (1), at all points at once."""
    along = jnp.zeros_like(z).at[:, axis].set(1)

    def first(z: jax.Array) -> jax.Array:
        return jax.jvp(functools.partial(u, params), (z,), (along,))[1]

    return jax.jvp(first, (z,), (along,))[1]


def losses_fn(params: Params, key: jax.Array, points: int = 64) -> dict[str, jax.Array]:
    """The mean squares of the five terms, at random points."""
    z = jax.random.uniform(key, (points, 2), minval=-1, maxval=1)
    f = (1 - jnp.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)) * exact(z)
    terms = {
        "equation": second(params, z, 0) + second(params, z, 1) + u(params, z) - f,
        "left": u(params, z.at[:, 0].set(-1)),
        "right": u(params, z.at[:, 0].set(1)),
        "bottom": u(params, z.at[:, 1].set(-1)),
        "top": u(params, z.at[:, 1].set(1)),
    }
    return {term: jnp.mean(errors**2) for term, errors in terms.items()}


def start(
    key: jax.Array, weighting: mtl_jax.Weighting, steps: int
) -> tuple[Params, dict[str, jax.Array]]:
    """Train by Adam from one seed; the parameters, and the weights at the end."""
    init_key, data_key = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, weighting), optimizer)
    state = step.init(init(init_key), data_key, weighting_key=data_key)
    state, value = jax.lax.scan(step, state, jax.random.split(data_key, steps))
    # The mean of the last weights, since those of one step are noisy.
    weights = {term: course[-100:].mean() for term, course in value.weights.items()}
    return state.params, weights


def finish(params: Params, weights: dict[str, jax.Array], key: jax.Array, steps: int) -> Params:
    """Go on by L-BFGS: the weights are held, and so are the points, of which there are more."""
    held = functools.partial(losses_fn, key=key, points=256)
    gradient = mtl_jax.value_and_grad(held, mtl_jax.constant(weights))
    step = mtl_jax.make_train_step(gradient, optax.lbfgs())
    state, _ = jax.lax.scan(lambda state, _: step(state), step.init(params), length=steps)
    return state.params


def error(params: Params) -> jax.Array:
    """The error relative to the exact solution, by L2 norms on a grid."""
    x, y = jnp.meshgrid(*2 * [jnp.linspace(-1, 1, 50)])
    z = jnp.stack([x.ravel(), y.ravel()], axis=1)
    found, truth = u(params, z), exact(z)
    return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)


def main(
    steps: int = 2000, more: int = 100, seeds: int = 4, names: tuple[str, ...] = tuple(WEIGHTINGS)
) -> dict[str, tuple[float, float]]:
    """Compare the weightings; return their mean errors, after Adam and after L-BFGS."""
    keys = jax.random.split(jax.random.key(0), seeds)
    go_on = jax.jit(jax.vmap(functools.partial(finish, steps=more)))  # compiled once for all
    errors: dict[str, tuple[float, float]] = {}
    for name in names:
        of_seed = functools.partial(start, weighting=WEIGHTINGS[name], steps=steps)
        params, weights = jax.jit(jax.vmap(of_seed))(keys)
        adam, lbfgs = (jax.vmap(error)(p) for p in (params, go_on(params, weights, keys)))
        errors[name] = float(adam.mean()), float(lbfgs.mean())
        print(
            f"{name}: error {adam.mean():.2%} (from {adam.min():.2%} to {adam.max():.2%}), then "
            f"{lbfgs.mean():.2%} (from {lbfgs.min():.2%} to {lbfgs.max():.2%}) by L-BFGS"
        )
    return errors


if __name__ == "__main__":
    main()
