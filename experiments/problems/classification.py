"""The problem of predicting several labels of one input, whatever the input is."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from experiments.networks.heads import Heads
from mtl_jax.compare.problem import Batch, Problem, Split, Task
from mtl_jax.masking import masked_mean

MISSING = -1
"""The label of an example that has none."""


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
    learning_rate: float,
    epochs: int,
    batch_size: int,
) -> Problem:
    """Make a problem whose tasks are classifications of one input by one encoder.

    The parameters are ``{"encoder": ..., "heads": ...}``, those of the encoder being shared. The
    loss of a task is the cross entropy, its metric the accuracy. The optimizer is Adam with a
    cosine decay of the learning rate to 0.

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
      learning_rate: the learning rate that the problem is shipped with.
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
        return {"encoder": encoder_variables["params"], "heads": heads_variables["params"]}, {}

    def encode(
        params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        x = inputs(batch)
        if augment is not None:
            x = augment(key, x)
        return encoder.apply({"params": params["encoder"]}, x), model_state

    def predict(
        params: PyTree, zs: Mapping[str, PyTree]
    ) -> dict[str, Float[Array, "batch classes"]]:
        logits = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(logits, dict)
        return logits

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        logits = predict(params, zs)
        return {task: _cross_entropy(logits[task], batch[task]) for task in classes}

    def scores(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Float[Array, "batch"]]:
        z = encoder.apply({"params": params["encoder"]}, inputs(batch))
        logits = predict(params, dict.fromkeys(classes, z))
        return {
            task: (logits[task].argmax(axis=-1) == batch[task]).astype(jnp.float32)
            for task in classes
        }

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
        scores=scores,
        labelled=None if complete else labelled,
        optimizer=adam_cosine,
        learning_rate=learning_rate,
        epochs=epochs,
        batch_size=batch_size,
    )


def adam_cosine(learning_rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam, its learning rate falling to 0 along a half cosine."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def _cross_entropy(logits: Float[Array, "batch classes"], labels: Array) -> Float[Array, ""]:
    present = labels != MISSING
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(present, labels, 0))
    return masked_mean(values, present)
