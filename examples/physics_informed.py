"""A physics-informed network: the terms of its loss are the tasks.

The heat equation u_t = a u_xx on 0 <= x <= 1, with u = 0 at both ends and two waves at the start.
The network u(x, t) is trained on how far it is from the equation, from the boundary values and from
the initial values; how much each of the three counts is what weightings decide. The exact solution
is known, so the weightings are compared by the error that counts, which none of them sees.
"""

import functools

import jax
import jax.numpy as jnp
import optax

import mtl_jax

Params = list[dict[str, jax.Array]]
DIFFUSIVITY = 0.1
WEIGHTINGS = {
    "equal": mtl_jax.equal(),
    "softadapt": mtl_jax.softadapt(window=10),
    "relobralo": mtl_jax.relobralo(),
    "gradnorm": mtl_jax.gradnorm(optax.adam(1e-2)),
    "conflict_free": mtl_jax.conflict_free(),
}


def exact(x: jax.Array, t: jax.Array) -> jax.Array:
    """The solution: the short wave fades nine times as fast as the long one."""
    rate = DIFFUSIVITY * jnp.pi**2
    long = jnp.exp(-rate * t) * jnp.sin(jnp.pi * x)
    return long + jnp.exp(-9 * rate * t) * jnp.sin(3 * jnp.pi * x)


def init(key: jax.Array, widths: tuple[int, ...] = (2, 32, 32, 1)) -> Params:
    """The layers of the network."""
    return [
        {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros((n,))}
        for key, m, n in zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    ]


def u(params: Params, x: jax.Array, t: jax.Array) -> jax.Array:
    """The network at one point."""
    z = jnp.stack([2 * x - 1, 2 * t - 1])
    for layer in params[:-1]:
        z = jnp.tanh(z @ layer["w"] + layer["b"])
    return (z @ params[-1]["w"] + params[-1]["b"])[0]


def losses_fn(params: Params, key: jax.Array, points: int = 64) -> dict[str, jax.Array]:
    """The mean squares of the three terms, at random points."""
    x, t, side = jax.random.uniform(key, (3, points))

    def residual(x: jax.Array, t: jax.Array) -> jax.Array:
        u_t = jax.grad(u, argnums=2)(params, x, t)
        u_xx = jax.grad(jax.grad(u, argnums=1), argnums=1)(params, x, t)
        return u_t - DIFFUSIVITY * u_xx

    at = jax.vmap(functools.partial(u, params))
    terms = {
        "equation": jax.vmap(residual)(x, t),
        "boundary": at(jnp.round(side), t),
        "initial": at(x, jnp.zeros_like(t)) - exact(x, jnp.zeros_like(t)),
    }
    return {term: jnp.mean(errors**2) for term, errors in terms.items()}


def train(key: jax.Array, weighting: mtl_jax.Weighting, steps: int) -> jax.Array:
    """Train from one seed; the error relative to the exact solution, by L2 norms on a grid."""
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, weighting), optimizer)
    init_key, data_key = jax.random.split(key)
    state = step.init(init(init_key), data_key)
    state, _ = jax.lax.scan(step, state, jax.random.split(data_key, steps))
    x, t = (axis.ravel() for axis in jnp.meshgrid(*2 * [jnp.linspace(0, 1, 50)]))
    truth = exact(x, t)
    found = jax.vmap(functools.partial(u, state.params))(x, t)
    return jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)


def main(
    steps: int = 2000, seeds: int = 4, names: tuple[str, ...] = tuple(WEIGHTINGS)
) -> dict[str, float]:
    """Compare the weightings, and return their mean errors."""
    errors: dict[str, float] = {}
    for name in names:
        run = jax.jit(jax.vmap(functools.partial(train, weighting=WEIGHTINGS[name], steps=steps)))
        found = run(jax.random.split(jax.random.key(0), seeds))
        errors[name] = float(found.mean())
        print(f"{name}: error {found.mean():.2%}, from {found.min():.2%} to {found.max():.2%}")
    return errors


if __name__ == "__main__":
    main()
