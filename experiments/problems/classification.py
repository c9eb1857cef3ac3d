"""The problem of predicting several labels of one input, whatever the input is."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from experiments.networks.heads import Heads
from mtl_jax._masking import masked_mean
from mtl_jax.compare.data import Batch, Split
from mtl_jax.compare.problem import Problem, Task

MISSING = -1
"""The label of an example that has none."""


def adam_cosine(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam, its learning rate falling to 0 along a half cosine."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def sgd_cosine(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """The usual recipe for CIFAR: momentum 0.9, weight decay 5e-4, a half cosine to 0.

    As in PyTorch's SGD all parameters decay, and what decays is added to the gradient.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


def classification(
    *,
    name: str,
    description: str,
    classes: Mapping[str, int],
    splits: Mapping[str, Split],
    inputs: Callable[[Batch], Array],
    encoder: nn.Module,
    hidden: int | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
    optimizer: Callable[[float, int], optax.GradientTransformation] = adam_cosine,
    learning_rate: float,
    epochs: int,
    batch_size: int,
) -> Problem:
    """Make a problem whose tasks are classifications of one input by one encoder.

    The parameters are ``{"encoder": ..., "heads": ...}``, those of the encoder being shared. The
    loss of a task is the cross entropy, its metric the accuracy.

    What the encoder has besides parameters, such as the running statistics of batch normalisation,
    is the model state. Such an encoder is called with ``train=True`` in training, when it updates
    that state, and without it for the metrics.

    Args:
      name: the problem's name.
      description: a sentence for the reader of the tables.
      classes: the number of classes of each task.
      splits: ``"train"``, ``"validation"`` and ``"test"``. Each task's labels are the field of its
        name: integers from 0, or :data:`MISSING`.
      inputs: the encoder's input, from a batch.
      encoder: from the input to the representation.
      hidden: the width of a hidden layer in each head; ``None`` for linear heads.
      augment: ``augment(key, inputs) -> inputs``, a random change of the inputs in training.
      optimizer: ``optimizer(learning_rate, num_steps)``: the optax optimizer of a run.
      learning_rate: the problem's default learning rate.
      epochs: passes over the training examples.
      batch_size: examples a step.

    Returns:
      The problem. It has ``labelled`` only if some label is missing.
    """
    heads = Heads(dict(classes), hidden)
    train = splits["train"]

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, heads_key = jax.random.split(key)
        example = inputs({field: jnp.asarray(values[:1]) for field, values in train.items()})
        z, encoder_variables = encoder.init_with_output(encoder_key, example)
        heads_variables = heads.init(heads_key, dict.fromkeys(classes, z))
        encoder_params = encoder_variables.pop("params")
        params = {"encoder": encoder_params, "heads": heads_variables["params"]}
        return params, dict(encoder_variables)

    def encode(
        params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        x = inputs(batch)
        if augment is not None:
            x = augment(key, x)
        variables = {"params": params["encoder"], **model_state}
        if not model_state:
            return encoder.apply(variables, x), model_state
        z, model_state = encoder.apply(variables, x, train=True, mutable=list(model_state))
        return z, model_state

    def logits_of(
        params: PyTree, zs: Mapping[str, PyTree]
    ) -> dict[str, Float[Array, "batch classes"]]:
        logits = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(logits, dict)
        return logits

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        logits = logits_of(params, zs)
        return {task: cross_entropy(logits[task], batch[task]) for task in classes}

    def predict(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Float[Array, "batch classes"]]:
        z = encoder.apply({"params": params["encoder"], **model_state}, inputs(batch))
        return logits_of(params, dict.fromkeys(classes, z))

    def labelled(batch: Batch) -> dict[str, Bool[Array, "batch"]]:
        return {task: batch[task] != MISSING for task in classes}

    complete = all((split[task] != MISSING).all() for split in splits.values() for task in classes)
    return Problem(
        name=name,
        description=description,
        tasks={task: Task() for task in classes},
        train=train,
        validation=splits["validation"],
        test=splits["test"],
        init=init,
        encoder=encode,
        heads=losses_of,
        shared=lambda path: path.startswith("encoder/"),
        predict=predict,
        labelled=None if complete else labelled,
        optimizer=optimizer,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
    )


def cross_entropy(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, ""]:
    """The mean cross entropy of the examples whose label is not :data:`MISSING`."""
    present = labels != MISSING
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(present, labels, 0))
    return masked_mean(values, present)
