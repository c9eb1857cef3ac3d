"""A problem of your own to compare: ``mtl-jax compare examples.tabular:problem --seeds 5``.

442 patients with diabetes (Efron et al., 2004, from scikit-learn): from age, sex and six blood
values, how far will the disease go in a year, what is the body mass index, what the blood pressure?
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

from mtl_jax.compare import Problem, Task, mean_of

TASKS = ("progression", "bmi", "pressure")
ERROR = mean_of(optax.squared_error, "squared error", higher_is_better=False)


def read_splits() -> dict[str, Any]:
    """Training, validation and test patients; everything in units of its standard deviation."""
    patients: Any = load_diabetes()
    table, progression = patients["data"], patients["target"]
    columns = {"x": np.delete(table, [2, 3], axis=1)}
    columns |= {"progression": progression, "bmi": table[:, 2], "pressure": table[:, 3]}
    data = {n: ((c - c.mean(0)) / c.std(0)).astype(np.float32) for n, c in columns.items()}
    train, rest = train_test_split(np.arange(len(progression)), test_size=0.4, random_state=0)
    parts = {"train": train, "validation": rest[::2], "test": rest[1::2]}
    return {s: {n: column[rows] for n, column in data.items()} for s, rows in parts.items()}


def init(key: jax.Array) -> tuple[Any, Any]:
    """The parameters, and a model state, which this network does not have."""
    keys = jax.random.split(key, 1 + len(TASKS))
    heads = {t: jax.random.normal(k, (32,)) / 6 for t, k in zip(TASKS, keys[1:], strict=True)}
    return {"encoder": jax.random.normal(keys[0], (8, 32)) / 3, "heads": heads}, {}


def encoder(params: Any, model_state: Any, key: Any, batch: Any) -> tuple[jax.Array, Any]:
    """What all tasks share. ``key`` would be for dropout."""
    return jnp.tanh(batch["x"] @ params["encoder"]), model_state


def losses(params: Any, zs: Any, batch: Any) -> dict[str, jax.Array]:
    """The mean squared error of each task, from its own copy of the representation."""
    return {t: jnp.mean((zs[t] @ params["heads"][t] - batch[t]) ** 2) for t in TASKS}


def problem() -> Problem:
    """The problem."""
    return Problem(
        name="diabetes",
        tasks=dict.fromkeys(TASKS, Task(ERROR)),
        **read_splits(),
        init=init,
        encoder=encoder,
        heads=losses,
        predict=lambda params, model_state, batch: {  # what the metric compares with the labels
            t: encoder(params, model_state, None, batch)[0] @ params["heads"][t] for t in TASKS
        },
        optimizer=lambda learning_rate, num_steps: optax.adam(learning_rate),
        learning_rate=3e-3,
        epochs=30,
        batch_size=32,
    )
