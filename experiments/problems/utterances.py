"""Utterances of chatterbots: their language, their topic, and whether they open or reply."""

import collections
import importlib.resources
from collections.abc import Iterable, Iterator

import numpy as np

from experiments.networks.text import BagEncoder, character_ngrams, hashed_ids
from experiments.problems.classification import classification
from mtl_jax.compare.problem import Problem

BUCKETS = 16_384
NGRAM_LENGTHS = (1, 2, 3)
MAX_NGRAMS = 128
RARE = 50
"""A language or topic with fewer texts than this is dropped."""

TOPICS = {
    "IA": "ai",
    "computer": "computers",
    "coversations": "conversations",
    "dinero": "money",
    "emociones": "emotion",
    "emotions": "emotion",
    "greeting": "greetings",
    "perfilbot": "botprofile",
    "profile": "botprofile",
    "psicologia": "psychology",
    "sport": "sports",
}
"""Other names of the same topic in the corpus."""

Labels = tuple[str, str, str]


def utterances(*, max_texts: int | None = None) -> Problem:
    """Build the three tasks over the texts of the package chatterbot-corpus.

    A text is an utterance, its white space and its case normalised. Equal texts are one example; a
    text that occurs with different labels has no true one and is dropped, as are the texts of a
    language or a topic that is rare. A tenth of the texts is held out for validation and a fifth
    for the test. The data are the same at every call.

    Args:
      max_texts: take only so many texts, drawn at random; ``None`` for all.

    Returns:
      The problem, with the tasks ``language``, ``topic`` and ``role`` (the utterance opens a
      conversation or replies).
    """
    splits, classes = utterance_splits(max_texts)
    return classification(
        name="utterances",
        description="Utterances of chatterbots in many languages: which language, which topic, and "
        "does it open a conversation or reply?",
        classes=classes,
        splits=splits,
        inputs=lambda batch: batch["ids"],
        encoder=BagEncoder(BUCKETS, width=32),
        learning_rate=1e-2,
        epochs=6,
        batch_size=256,
    )


def utterance_splits(
    max_texts: int | None = None,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """The splits of the data, with the fields ``ids`` and the tasks', and each task's classes."""
    texts = distinct_texts()
    names = [sorted({labels[task] for labels in texts.values()}) for task in range(3)]
    order = np.random.default_rng(0).permutation(len(texts))[:max_texts]
    keys = list(texts)
    held_out, tenth = len(order) // 10 * 3, len(order) // 10
    parts = {
        "train": order[held_out:],
        "validation": order[:tenth],
        "test": order[tenth:held_out],
    }
    splits = {}
    for split, rows in parts.items():
        chosen = [keys[row] for row in rows]
        splits[split] = {"ids": ngram_ids(chosen, MAX_NGRAMS)} | {
            task: np.array([names[i].index(texts[text][i]) for text in chosen], np.int32)
            for i, task in enumerate(("language", "topic", "role"))
        }
    return splits, {"language": len(names[0]), "topic": len(names[1]), "role": len(names[2])}


def ngram_ids(texts: Iterable[str], max_ngrams: int) -> np.ndarray:
    """The ids of the texts' n-grams of characters."""
    ngrams = (character_ngrams(text, NGRAM_LENGTHS) for text in texts)
    return hashed_ids(ngrams, BUCKETS, max_ngrams)


def distinct_texts() -> dict[str, Labels]:
    """The labels (language, topic, role) of each text that is kept."""
    labels: dict[str, set[Labels]] = {}
    for text, own in corpus():
        labels.setdefault(text, set()).add(own)
    texts = {text: own.pop() for text, own in labels.items() if len(own) == 1}
    languages = collections.Counter(language for language, _, _ in texts.values())
    topics = collections.Counter(topic for _, topic, _ in texts.values())
    return {
        text: own
        for text, own in texts.items()
        if languages[own[0]] >= RARE and topics[own[1]] >= RARE
    }


def corpus() -> Iterator[tuple[str, Labels]]:
    """All utterances of the corpus: the normalised text, and its language, topic and role."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    root = importlib.resources.files("chatterbot_corpus") / "data"
    for language in sorted(root.iterdir(), key=lambda folder: folder.name):
        for file in sorted(language.iterdir(), key=lambda file: file.name):
            topic = file.name.removesuffix(".yml")
            content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
            for conversation in content["conversations"]:
                if isinstance(conversation, list):
                    for turn, utterance in enumerate(conversation):
                        text = " ".join(str(utterance).split()).casefold()
                        role = "reply" if turn else "prompt"
                        yield text, (language.name, TOPICS.get(topic, topic), role)
