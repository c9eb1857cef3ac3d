"""News stories and utterances: five tasks on texts of two datasets, read by one encoder."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from experiments.networks.heads import Heads
from experiments.networks.text import BagEncoder
from experiments.problems.ag_news import AGENCIES, stories
from experiments.problems.classification import MISSING, adam_cosine, cross_entropy
from experiments.problems.utterances import BUCKETS, ngram_ids, utterance_splits
from mtl_jax.compare.data import Batch
from mtl_jax.compare.problem import Problem, Task

MAX_NGRAMS_OF_STORIES = 384
"""Of 128 characters: the title, and how the story begins."""


def news_and_utterances(
    data_dir: str | None = None, *, max_utterances: int | None = None
) -> Problem:
    """Build the tasks of AG News and those of the utterances, each on texts of its own.

    The two datasets have texts of their own and are of unequal size, about two to one or, with all
    of AG News, ten to one; every step draws a batch from each. The encoder, a bag of n-grams of
    characters, is shared by all tasks.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.
      max_utterances: take only so many utterances, drawn at random; ``None`` for all.

    Returns:
      The problem, with the tasks ``subject`` (4 classes) and ``agency`` (3, often missing) of
      the dataset ``news``, and ``language``, ``topic`` and ``role`` of ``utterances``.

    Raises:
      FileNotFoundError: if the news are not prepared and cannot be prepared here.
    """
    news = stories(data_dir, functools.partial(ngram_ids, max_ngrams=MAX_NGRAMS_OF_STORIES))
    utterances, classes = utterance_splits(max_utterances)
    # Both datasets have topics; those of the news are called subjects here.
    news = {part: {"subject": split.pop("topic"), **split} for part, split in news.items()}
    dataset_of = {"subject": "news", "agency": "news"} | dict.fromkeys(classes, "utterances")
    classes = {"subject": 4, "agency": len(AGENCIES)} | classes
    splits: Any = {part: {"news": news[part], "utterances": utterances[part]} for part in news}
    encoder, heads = BagEncoder(BUCKETS, width=64), Heads(classes)

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Array]:
        zs = {
            dataset: encoder.apply({"params": params["encoder"]}, fields["ids"])
            for dataset, fields in batch.items()
        }
        zs = {task: zs[dataset] for task, dataset in dataset_of.items()}
        logits = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(logits, dict)
        return logits

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, heads_key = jax.random.split(key)
        ids = jnp.asarray(utterances["train"]["ids"][:1])
        z, variables = encoder.init_with_output(encoder_key, ids)
        heads_variables = heads.init(heads_key, dict.fromkeys(classes, z))
        return {"encoder": variables["params"], "heads": heads_variables["params"]}, {}

    def losses(
        params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[dict[str, Array], PyTree]:
        logits = predict(params, model_state, batch)
        return {
            task: cross_entropy(logits[task], batch[dataset][task])
            for task, dataset in dataset_of.items()
        }, model_state

    return Problem(
        name="news_and_utterances",
        description="News stories (what about, and which agency wrote it?) and utterances of "
        "chatterbots (which language, which topic, prompt or reply?), read by one encoder.",
        tasks={task: Task() for task in classes},
        **splits,
        init=init,
        losses=losses,
        shared=lambda path: path.startswith("encoder/"),
        dataset_of=dataset_of,
        predict=predict,
        labelled=lambda batch: {
            task: batch[dataset][task] != MISSING for task, dataset in dataset_of.items()
        },
        optimizer=adam_cosine,
        learning_rate=1e-2,
        epochs=4,
        batch_size={"news": 256, "utterances": 128},
    )
