"""Every method with the parameters that the shared checks run it with, each made once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax import METHODS as RECORDS
from mtl_jax import RunSettings

TASKS = ("a", "b", "c")
KEY = jax.random.key(7)
SETTINGS = RunSettings(steps_per_epoch=2, epochs=10, optimizer=optax.adam(0.05))
EVERYBODY = dict.fromkeys(TASKS, np.True_)

# Arguments beside those that the records require.
OWN = {
    "constant": {"weights": {"a": 0.5, "b": 1.0, "c": 1.5}},
    "dynamic_task_prioritization": {"decay": 0.5},
    "causal": {"order": ("c", "a", "b")},
    "softadapt": {"beta": 1.0},
    "relobralo": {"alpha": 0.9},
    "stch": {"warmup": 3, "window": 1},
    "gradnorm": {"optimizer": optax.sgd(0.01)},
    "fair_grad": {"alpha": 2.0},
    "graddrop": {"leak": 0.3},
    "moco": {"rho": 0.1},
    "excess_mtl": {"step_size": 0.5},
    "lr_annealing": {"alpha": 0.5},
}
VARIANTS = {
    "adaptive[emphasis=2,decay=0.9]": {"emphasis": 2.0, "decay": 0.9},
    "adaptive[softmax]": {"rule": "softmax"},
    "adaptive[initial]": {"relative_to": "initial"},
    "adaptive[window=2]": {"relative_to": "initial", "window": 2},
    "group_dro[reference]": {
        "step_size": 1.0,
        "reference": 1.0,
        "normalize": True,
        "smoothing": 0.1,
    },
    "uncertainty[half]": {"optimizer": optax.sgd(0.05), "form": "half"},
    "uncertainty[revised]": {
        "optimizer": optax.sgd(0.05),
        "initial_log_variance": 0.5,
        "form": "revised",
    },
    "random_weighting[dirichlet]": {"distribution": "dirichlet"},
    "dynamic_task_prioritization[metrics]": {"performance": "metrics"},
    "achievement[arithmetic]": {"form": "arithmetic"},
    "cov_weighting[decay=0.9]": {"decay": 0.9},
    "softadapt[normalized]": {"beta": 0.1, "variant": "normalized"},
    "softadapt[loss_weighted]": {
        "window": 1,
        "beta": 0.1,
        "order": 3,
        "variant": "loss_weighted",
    },
    "relobralo[rho=0.5]": {"rho": 0.5},
    "stch[mu=0.1,window=2]": {"mu": 0.1, "window": 2},
    "norm_balance[momentum=0]": {"momentum": 0.0},
    "norm_balance[root_loss]": {"norm_of": "root_loss"},
    "mgda[l2]": {"normalization": "l2"},
    "mgda[loss]": {"normalization": "loss"},
    "mgda[loss+]": {"normalization": "loss+"},
    "aligned_mtl[rmse]": {"scale": "rmse"},
}
# Those that add an epsilon, without it.
WITHOUT_EPS = {
    "moco[eps=0]": {"eps": 0.0},
    "excess_mtl[eps=0]": {"step_size": 0.5, "eps": 0.0},
    "db_mtl[eps=0]": {"beta": 0.5, "beta_sigma": 0.5, "eps": 0.0},
}


def record(name):
    """What is known of the method of a name such as ``mgda[l2]``."""
    return RECORDS[name.partition("[")[0]]


def arguments(name):
    if name in WITHOUT_EPS:
        return WITHOUT_EPS[name]
    return OWN.get(record(name).name, {}) | VARIANTS.get(name, {})


def make(name):
    return record(name).make(SETTINGS, **arguments(name))


made = functools.cache(make)
"""The method of a name, made once, so that what it compiles is compiled once."""


def _table(*reads):
    """The factories of the methods that read this, each with its variants."""
    names = sorted([*RECORDS, *VARIANTS], key=lambda name: list(RECORDS).index(record(name).name))
    return {name: functools.partial(make, name) for name in names if record(name).reads in reads}


METHODS = _table("the losses", "the losses after the step, too")
GRAMIAN_METHODS = _table("the Gramian")
ROW_METHODS = _table("the task gradients")
RANDOM = (
    *(name for name in [*RECORDS, *VARIANTS] if record(name).draws),
    "relobralo[rho=0.5]",
)
TOTALS = {name: {"K": len(TASKS), "1": 1}.get(record(name).total) for name in METHODS}
TOTALS["constant"] = len(TASKS)


@functools.cache
def loss_sequence(steps=8, dtype=jnp.float32, seed=0):
    """Losses that fall at different rates, with noise: one pytree for each step."""
    keys = jax.random.split(jax.random.key(seed), steps)
    noise = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys))
    falling = (2.0 + np.arange(3)) * np.exp(-np.outer(np.arange(steps), (0.3, 0.1, 0.02)))
    return [
        {task: jnp.asarray(loss, dtype) for task, loss in zip(TASKS, losses, strict=True)}
        for losses in falling * (0.8 + 0.4 * noise)
    ]


def run_vectors(weighting, sequence, masks=None):
    """The weights of every step, and the last state, of losses and masks as rows of an array."""
    state, found = weighting.init(tuple(sequence[0])), []
    for step, losses in enumerate(sequence):
        mask = (True,) * len(losses) if masks is None else tuple(masks[step])
        weights, state = weighting.update(tuple(losses), state, mask=mask)
        found.append(weights)
    return np.array(found), state


def run(weighting, sequence, *, masks=None, key=KEY, update=None):
    """Run a weighting over a sequence of losses, observing 0.9 of each after the step.

    A mask is always given, so that all calls of a weighting are of one program.
    """
    update = weighting.update if update is None else update
    state = weighting.init(sequence[0], key=key)
    history = []
    for step, losses in enumerate(sequence):
        mask = EVERYBODY if masks is None else masks[step]
        weights, state = update(losses, state, mask=mask)
        if weighting.observe is not None:
            after = {
                task: loss.astype(jnp.result_type(loss, jnp.float32)) * (0.9 - 0.1 * k)
                for k, (task, loss) in enumerate(losses.items())
            }
            state = weighting.observe(after, state, mask=mask)
        history.append(weights)
    return history, state
