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
    "softadapt": mtl_jax.softadapt(window=10),
    "relobralo": mtl_jax.relobralo(),
    "norm_balance": mtl_jax.norm_balance(norm_of="root_loss"),
    "conflict_free": mtl_jax.conflict_free(),
}
WAVES = (1, 2)
"""Half waves in each half of the two directions; (1, 4) in the papers, which takes more steps."""


def exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """The solution, from which f follows."""
    return jnp.sin(WAVES[0] * jnp.pi * x) * jnp.sin(WAVES[1] * jnp.pi * y)


def init(key: jax.Array, widths: tuple[int, ...] = (2, 32, 32, 1)) -> Params:
    """The layers of the network."""
    return [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros((n,))}
        for key, m, n in zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    ]


def u(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The network at one point."""
    z = 1.7 * jnp.stack([x, y])
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return (z @ params[-1]["w"] + params[-1]["b"])[0]


def losses_fn(params: Params, key: jax.Array, points: int = 64) -> dict[str, jax.Array]:
    """The mean squares of the five terms, at random points."""
    x, y = jax.random.uniform(key, (2, points), minval=-1, maxval=1)
    factor = 1 - jnp.pi**2 * (WAVES[0] ** 2 + WAVES[1] ** 2)

    def residual(x: jax.Array, y: jax.Array) -> jax.Array:
        u_xx = jax.grad(jax.grad(u, argnums=1), argnums=1)(params, x, y)
        u_yy = jax.grad(jax.grad(u, argnums=2), argnums=2)(params, x, y)
        return u_xx + u_yy + u(params, x, y) - factor * exact(x, y)

    at, one = jax.vmap(functools.partial(u, params)), jnp.ones(points)
    terms = {
        "equation": jax.vmap(residual)(x, y),
        "left": at(-one, y),
        "right": at(one, y),
        "bottom": at(x, -one),
        "top": at(x, one),
    }
    return {term: jnp.mean(errors**2) for term, errors in terms.items()}


def train(
    key: jax.Array, weighting: mtl_jax.Weighting, steps: int, more: int
) -> tuple[jax.Array, jax.Array]:
    """Train from one seed; the error after Adam, and after as many steps more of L-BFGS."""
    init_key, data_key = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, weighting), optimizer)
    state = step.init(init(init_key), data_key, weighting_key=data_key)
    state, value = jax.lax.scan(step, state, jax.random.split(data_key, steps))
    weights = jax.tree.map(lambda course: course[-1], value.weights)

    fixed = functools.partial(losses_fn, key=data_key, points=512)
    gradient = mtl_jax.value_and_grad(fixed, mtl_jax.constant(weights))
    finish = mtl_jax.make_train_step(gradient, optax.lbfgs())
    finished, _ = jax.lax.scan(lambda s, _: finish(s), finish.init(state.params), length=more)
    return error(state.params), error(finished.params)


def error(params: Params) -> jax.Array:
    """The error relative to the exact solution, by L2 norms on a grid."""
    x, y = (axis.ravel() for axis in jnp.meshgrid(*2 * [jnp.linspace(-1, 1, 50)]))
    found, truth = jax.vmap(functools.partial(u, params))(x, y), exact(x, y)
    return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)


def main(
    steps: int = 2000, more: int = 100, seeds: int = 4, names: tuple[str, ...] = tuple(WEIGHTINGS)
) -> dict[str, tuple[float, float]]:
    """Compare the weightings; return their mean errors, after Adam and after L-BFGS."""
    errors: dict[str, tuple[float, float]] = {}
    for name in names:
        of_seed = functools.partial(train, weighting=WEIGHTINGS[name], steps=steps, more=more)
        adam, lbfgs = jax.jit(jax.vmap(of_seed))(jax.random.split(jax.random.key(0), seeds))
        errors[name] = float(adam.mean()), float(lbfgs.mean())
        print(
            f"{name}: error {adam.mean():.2%} (from {adam.min():.2%} to {adam.max():.2%}), then "
            f"{lbfgs.mean():.2%} (from {lbfgs.min():.2%} to {lbfgs.max():.2%}) by L-BFGS"
        )
    return errors


if __name__ == "__main__":
    main()
