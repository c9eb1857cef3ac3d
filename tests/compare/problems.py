"""Small problems with the metrics and the forms of data that real ones have."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax
from mtl_jax.compare import (
    Problem,
    Task,
    accuracy,
    correlation,
    entity_f1,
    f1,
    mean_absolute_error,
    mean_iou,
    r2,
    relative_error,
    roc_auc,
    root_mean_squared_error,
)

SIZES = {"train": 64, "validation": 20, "test": 28}
SETTINGS = {
    "optimizer": lambda learning_rate, num_steps: optax.adam(learning_rate),
    "learning_rate": 0.01,
    "epochs": 2,
    "batch_size": 16,
}


def splits(make):
    """The three splits by ``make(rng, number)``."""
    return {
        split: make(np.random.default_rng(seed), number)
        for seed, (split, number) in enumerate(SIZES.items())
    }


def dense(key, *shape):
    return jax.random.normal(key, shape) / np.sqrt(shape[0])


def cross_entropy(logits, labels, valid):
    values = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return mtl_jax.masked_mean(values, valid)


# Segmentation and depth of pictures, with two metrics each


def scenes(**changes):
    """Pictures with four classes, 0 being ignored, and depths, 0 being unknown."""

    def make(rng, number):
        picture = rng.normal(size=(number, 6, 6, 3)).astype(np.float32)
        segments = 1 + picture.argmax(axis=-1)
        depth = 1 + np.abs(picture[..., 0] - picture[..., 1])
        unknown = rng.uniform(size=(2, *depth.shape)) < 0.1
        return {
            "picture": picture,
            "segments": np.where(unknown[0], 0, segments).astype(np.uint8),
            "depth": np.where(unknown[1], 0, depth).astype(np.float32),
        }

    def init(key):
        keys = jax.random.split(key, 3)
        heads = {"segments": dense(keys[1], 16, 4), "depth": dense(keys[2], 16)}
        return {"encoder": dense(keys[0], 3, 16), "heads": heads}, {}

    def encoder(params, model_state, key, batch):
        return jax.nn.relu(batch["picture"] @ params["encoder"]), model_state

    def heads(params, zs, batch):
        outputs = {task: zs[task] @ head for task, head in params["heads"].items()}
        labels = batch["segments"].astype(jnp.int32)
        error = jnp.abs(outputs["depth"] - batch["depth"])
        return {
            "segments": cross_entropy(outputs["segments"], labels, labels > 0),
            "depth": mtl_jax.masked_mean(error, batch["depth"] > 0),
        }

    def predict(params, model_state, batch):
        z, _ = encoder(params, model_state, None, batch)
        return {task: z @ head for task, head in params["heads"].items()}

    settings = {
        "name": "scenes",
        "tasks": {
            "segments": Task([mean_iou(4, ignore=0), accuracy(ignore=0, name="pixel accuracy")]),
            "depth": Task(
                [mean_absolute_error(scale=100, unit="cm", ignore=0), relative_error(ignore=0)]
            ),
        },
        **splits(make),
        "init": init,
        "encoder": encoder,
        "heads": heads,
        "shared": lambda path: path == "encoder",
        "predict": predict,
        **SETTINGS,
    }
    return Problem(**(settings | changes))


# Twelve binary tasks, some labels of which are missing


ASSAYS = tuple(f"assay {number}" for number in range(12))


def molecules(**changes):
    """Twelve binary tasks with 17 % of the labels missing, in one field."""

    def make(rng, number):
        x = rng.normal(size=(number, 8)).astype(np.float32)
        direction = np.random.default_rng(7).normal(size=(8, len(ASSAYS)))
        toxic = (x @ direction > 0.5).astype(np.int8)
        return {"x": x, "toxic": np.where(rng.uniform(size=toxic.shape) < 0.17, -1, toxic)}

    def init(key):
        keys = jax.random.split(key)
        return {"hidden": dense(keys[0], 8, 16), "heads": dense(keys[1], 16, len(ASSAYS))}, {}

    def predict(params, model_state, batch):
        logits = jnp.tanh(batch["x"] @ params["hidden"]) @ params["heads"]
        return {assay: logits[:, number] for number, assay in enumerate(ASSAYS)}

    def labelled(batch):
        return {assay: batch["toxic"][:, number] >= 0 for number, assay in enumerate(ASSAYS)}

    def losses(params, model_state, key, batch):
        logits, there = predict(params, model_state, batch), labelled(batch)
        return {
            assay: mtl_jax.masked_mean(
                optax.sigmoid_binary_cross_entropy(logits[assay], batch["toxic"][:, number]),
                there[assay],
            )
            for number, assay in enumerate(ASSAYS)
        }, model_state

    settings = {
        "name": "molecules",
        "tasks": {
            assay: Task(roc_auc(), label=lambda fields, number=number: fields["toxic"][:, number])
            for number, assay in enumerate(ASSAYS)
        },
        **splits(make),
        "init": init,
        "losses": losses,
        "shared": lambda path: path == "hidden",
        "predict": predict,
        "labelled": labelled,
        **SETTINGS,
    }
    return Problem(**(settings | changes))


# Pictures that are read one by one and turned over at random


@dataclasses.dataclass(frozen=True)
class Spots:
    """Pictures of 5 x 5 with one bright spot; the labels are its row and its column."""

    number: int
    seed: int

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        row, column = rng.integers(0, 5, 2)
        picture = rng.integers(0, 100, (5, 5), np.uint8)
        picture[row, column] = 255
        return {"picture": picture, "row": np.int32(row), "column": np.int32(column)}


class Flip(grain.transforms.RandomMap):
    """Turn half of the pictures over, left and right."""

    def random_map(self, example, rng):
        if rng.random() < 0.5:
            return example
        picture, column = example["picture"][:, ::-1], 4 - example["column"]
        return example | {"picture": picture, "column": column}


def spots(**changes):
    """A problem that is fed by Grain."""

    def init(key):
        keys = jax.random.split(key, 3)
        heads = {"row": dense(keys[1], 32, 5), "column": dense(keys[2], 32, 5)}
        return {"encoder": dense(keys[0], 25, 32), "heads": heads}, {}

    def encoder(params, model_state, key, batch):
        x = batch["picture"].reshape(-1, 25) / 255
        return jnp.tanh(x @ params["encoder"]), model_state

    def heads(params, zs, batch):
        return {
            task: cross_entropy(zs[task] @ head, batch[task], jnp.full(len(batch[task]), True))
            for task, head in params["heads"].items()
        }

    def predict(params, model_state, batch):
        z, _ = encoder(params, model_state, None, batch)
        return {task: z @ head for task, head in params["heads"].items()}

    settings = {
        "name": "spots",
        "tasks": {"row": Task(), "column": Task()},
        **{split: Spots(number, seed) for seed, (split, number) in enumerate(SIZES.items())},
        "init": init,
        "encoder": encoder,
        "heads": heads,
        "shared": lambda path: path == "encoder",
        "predict": predict,
        "transformations": [Flip()],
        **SETTINGS,
    }
    return Problem(**(settings | changes))


# Tags of words and a grade of the sentence, with three metrics each


TAGS = ("O", "B-place", "I-place", "B-time", "I-time")
PADDING = -1


def sentences(**changes):
    """Sentences of up to 7 words, with a tag for each word and a grade for the whole."""

    def make(rng, number):
        words = rng.normal(size=(number, 7, 5)).astype(np.float32)
        length = rng.integers(3, 8, number)
        tags = words.argmax(axis=-1)
        tags[np.arange(7) >= length[:, None]] = PADDING
        grade = words[:, :3, 0].sum(axis=1) + 0.1 * rng.normal(size=number)
        return {
            "words": words,
            "tags": tags.astype(np.int32),
            "grade": grade.astype(np.float32),
        }

    def init(key):
        keys = jax.random.split(key, 3)
        heads = {"tags": dense(keys[1], 16, len(TAGS)), "grade": dense(keys[2], 16)}
        return {"encoder": dense(keys[0], 5, 16), "heads": heads}, {}

    def predict(params, model_state, batch):
        z = jnp.tanh(batch["words"] @ params["encoder"])
        heads = params["heads"]
        return {"tags": z @ heads["tags"], "grade": z.mean(axis=1) @ heads["grade"]}

    def losses(params, model_state, key, batch):
        outputs = predict(params, model_state, batch)
        return {
            "tags": cross_entropy(outputs["tags"], batch["tags"], batch["tags"] != PADDING),
            "grade": jnp.mean((outputs["grade"] - batch["grade"]) ** 2),
        }, model_state

    settings = {
        "name": "sentences",
        "tasks": {
            "tags": Task(
                [
                    accuracy(ignore=PADDING),
                    f1("macro", ignore=PADDING),
                    entity_f1(TAGS, ignore=PADDING),
                ]
            ),
            "grade": Task([root_mean_squared_error(), r2(), correlation("spearman")]),
        },
        **splits(make),
        "init": init,
        "losses": losses,
        "shared": lambda path: path == "encoder",
        "predict": predict,
        **SETTINGS,
    }
    return Problem(**(settings | changes))


ALL = {"scenes": scenes, "molecules": molecules, "spots": spots, "sentences": sentences}
