"""A small regression problem with two tasks, for the tests of the comparison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax
from mtl_jax.compare import Problem, Task, mean_of

TARGETS = {"line": lambda x: x @ np.array([1.0, -2.0, 0.5]), "square": lambda x: np.sum(x**2, 1)}
THREE_TARGETS = TARGETS | {"product": lambda x: x[:, 0] * x[:, 1]}

SQUARED_ERROR = mean_of(optax.squared_error, "squared error", higher_is_better=False)


def split(size, seed):
    x = np.random.default_rng(seed).normal(size=(size, 3)).astype(np.float32)
    return {"x": x} | {task: f(x).astype(np.float32) for task, f in THREE_TARGETS.items()}


def outputs(params, x):
    hidden = jnp.tanh(x @ params["encoder"])
    return {task: hidden @ head for task, head in params["heads"].items()}


def init(key, tasks=tuple(TARGETS)):
    encoder, *heads = jax.random.split(key, 1 + len(tasks))
    params = {
        "encoder": jax.random.normal(encoder, (3, 16)),
        "heads": {
            task: jax.random.normal(head, (16,)) / 4
            for task, head in zip(tasks, heads, strict=True)
        },
    }
    return params, {"calls": jnp.zeros((), jnp.int32)}


def errors_of(predictions, batch):
    labelled = {task: jnp.isfinite(batch[task]) for task in predictions}
    return {
        task: mtl_jax.masked_mean(
            (predictions[task] - jnp.where(labelled[task], batch[task], 0)) ** 2, labelled[task]
        )
        for task in predictions
    }


def losses(params, model_state, key, batch):
    predictions = outputs(params, batch["x"])
    return errors_of(predictions, batch), {"calls": model_state["calls"] + 1}


def encoder(params, model_state, key, batch):
    return jnp.tanh(batch["x"] @ params["encoder"]), {"calls": model_state["calls"] + 1}


def heads(params, zs, batch):
    return errors_of({task: zs[task] @ head for task, head in params["heads"].items()}, batch)


def shared(path):
    return path == "encoder"


IN_PARTS = {"losses": None, "encoder": encoder, "heads": heads, "shared": shared}
"""Changes to the toy problem: the same losses, given as an encoder and heads."""


def predict(params, model_state, batch):
    return outputs(params, batch["x"])


def make_problem(targets=TARGETS, **changes):
    settings = {
        "name": "toy",
        "tasks": dict.fromkeys(targets, Task(SQUARED_ERROR)),
        "train": split(200, 0),
        "validation": split(50, 1),
        "test": split(70, 2),
        "init": functools.partial(init, tasks=tuple(targets)),
        "losses": losses,
        "predict": predict,
        "optimizer": lambda learning_rate, steps: optax.adam(learning_rate),
        "learning_rate": 0.01,
        "epochs": 3,
        "batch_size": 32,
    }
    return Problem(**(settings | changes))


DATASET_OF = {"line": "many", "square": "few"}


def two_datasets(many, few, seed):
    return {"many": split(many, seed), "few": split(few, seed + 10)}


def dataset_predict(params, model_state, batch):
    return {
        task: outputs(params, batch[dataset]["x"])[task] for task, dataset in DATASET_OF.items()
    }


def dataset_errors(params, batch):
    found = dataset_predict(params, {}, batch)
    return {task: (found[task] - batch[data][task]) ** 2 for task, data in DATASET_OF.items()}


def dataset_losses(params, model_state, key, batch):
    return jax.tree.map(jnp.mean, dataset_errors(params, batch)), model_state


def make_two_datasets(**changes):
    settings = {
        "train": two_datasets(100, 24, 0),
        "validation": two_datasets(30, 20, 1),
        "test": two_datasets(70, 30, 2),
        "losses": dataset_losses,
        "predict": dataset_predict,
        "shared": shared,
        "dataset_of": DATASET_OF,
        "batch_size": {"many": 16, "few": 5},
        "epochs": 2,
    }
    return make_problem(**(settings | changes))
