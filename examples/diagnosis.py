# %% [markdown]
# # Which task is neglected, and what weights do about it
#
# A network with one trunk and three heads. The tasks differ as real ones do: `large` is measured in
# large units, `noisy` cannot get better than its noise, `hard` takes longer to learn than the other
# two. We train with equal weights and look at the gradients, then let some weightings decide.

# %%
import functools
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import mtl_jax

plt.rcParams["figure.dpi"] = 72
TASKS = ("hard", "large", "noisy")  # in the order of the leaves of a dictionary: sorted


def truth(x: jax.Array) -> dict[str, jax.Array]:
    """What the heads should say."""
    return {"hard": jnp.sin(8 * x), "large": 10 * x**2, "noisy": jnp.cos(2 * x)}


def init(key: jax.Array) -> dict[str, jax.Array]:
    """A hidden layer, and a head for each task."""
    keys = jax.random.split(key, 3)
    hidden, bias = jax.random.normal(keys[0], (1, 64)), jax.random.normal(keys[1], (1, 64))
    return {"hidden": 3 * hidden, "bias": bias, "heads": jax.random.normal(keys[2], (64, 3)) / 8}


def predict(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """What the heads say."""
    z = jnp.tanh(x[:, None] @ params["hidden"] + params["bias"])
    return dict(zip(TASKS, (z @ params["heads"]).T, strict=True))


def losses_fn(params: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """The mean squared errors on a fresh batch."""
    x_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (64,), minval=-1.0)
    noise = {"hard": 0.0, "large": 0.0, "noisy": jax.random.normal(noise_key, (64,))}
    targets, outputs = truth(x), predict(params, x)
    return {t: jnp.mean((outputs[t] - targets[t] - noise[t]) ** 2) for t in TASKS}


# %% [markdown]
# All steps run in one `lax.scan`, which returns the value of every step: the losses, the weights
# and, with `diagnostics=True`, norms and angles of the task gradients.


# %%
def train(
    weighting: mtl_jax.Weighting, steps: int = 600, diagnostics: bool = False
) -> tuple[Any, mtl_jax.MultiTaskValue]:
    """Train, and return the parameters and the value of every step."""
    gradient = mtl_jax.value_and_grad(losses_fn, weighting, diagnostics=diagnostics)
    step = mtl_jax.make_train_step(gradient, optax.adam(5e-3))
    keys = jax.random.split(jax.random.key(1), steps)
    state = step.init(init(jax.random.key(0)), keys[0])
    state, values = jax.jit(functools.partial(jax.lax.scan, step))(state, keys)
    return state.params, values


def smooth(series: jax.Array) -> jax.Array:
    """The means of 20 steps each."""
    return series.reshape(-1, 20).mean(axis=1)


params, values = train(mtl_jax.equal(), diagnostics=True)
found = values.diagnostics
assert found is not None

figure, (losses, norms, cosines) = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for k, task in enumerate(TASKS):
    losses.semilogy(smooth(values.losses[task]), label=task)
    norms.semilogy(smooth(found.norms[:, k]), label=task)
for i, j in ((0, 1), (0, 2), (1, 2)):
    cosines.plot(smooth(found.cosines[:, i, j]), label=f"{TASKS[i]}, {TASKS[j]}")
cosines.axhline(0, color="0.8", zorder=0)
for axes, title in ((losses, "loss"), (norms, "gradient norm"), (cosines, "cosine")):
    axes.set(title=title, xlabel="20 steps")
    axes.legend(fontsize=8)
plt.show()

# %% [markdown]
# At first the gradient of `large` is five times as long as the others, and the sum points where it
# wants to go; later that of `noisy` is, whose loss cannot fall any further. The cosines are close
# to 0: the tasks do not pull against each other; what there is to decide is lengths, not conflicts.
#
# Now some weightings, one for each idea: the higher loss counts more (`adaptive`), as it is or
# relative to where it began; a learned variance for each task (`uncertainty`); the same angle to
# all gradients (`conflict_free`).

# %%
weightings = {
    "equal": mtl_jax.equal(),
    "adaptive": mtl_jax.adaptive(),
    "to initial": mtl_jax.adaptive(relative_to="initial"),
    "uncertainty": mtl_jax.uncertainty(optax.adam(5e-3)),
    "conflict_free": mtl_jax.conflict_free(),
}
trained = {name: train(weighting) for name, weighting in weightings.items()}

figure, rows = plt.subplots(1, len(trained), figsize=(12, 2.4), layout="constrained", sharey=True)
for axes, (name, (_, values)) in zip(rows, trained.items(), strict=True):
    total = sum(jnp.abs(values.weights[task]) for task in TASKS)
    for task in TASKS:
        axes.plot(smooth(values.weights[task] / total), label=task)
    axes.set(title=name, xlabel="20 steps", ylim=(0, 1))
rows[0].set_ylabel("share of the weights")
rows[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# `adaptive` follows the higher loss: first `large`, for its units, then `noisy`, whose noise it
# takes for difficulty; relative to the first losses the units no longer matter, but the noise does.
# `uncertainty` goes where a loss gets small; `conflict_free` lets no gradient's length count.
#
# What came of it: the share of each task's variance that the network leaves unexplained.

# %%
x = jnp.linspace(-1, 1, 500)
targets = truth(x)
unexplained: dict[str, list[float]] = {}
for name, (params, _) in trained.items():
    outputs = predict(params, x)
    unexplained[name] = [
        float(jnp.mean((outputs[t] - targets[t]) ** 2) / targets[t].var()) for t in TASKS
    ]
print(f"{'':15}" + "".join(f"{task:>9}" for task in TASKS))
for name, shares in unexplained.items():
    print(f"{name:15}" + "".join(f"{share:9.1%}" for share in shares))

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for k, (name, shares) in enumerate(unexplained.items()):
    axes.bar([i + 0.16 * k for i in range(len(TASKS))], shares, width=0.15, label=name)
axes.set(yscale="log", ylabel="unexplained variance", xticks=[i + 0.32 for i in range(3)])
axes.set_xticklabels(TASKS)
axes.legend(fontsize=8, ncols=2)
plt.show()

# %% [markdown]
# Here, on one seed, what looks at gradients or learns a variance serves `hard` a little better than
# equal weights do, and what looks at the size of the losses serves it worse: a loss can be high
# because its task is hard, but also for its units or its noise. So look first.
