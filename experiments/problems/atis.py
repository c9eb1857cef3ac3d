"""ATIS: what a traveller wants, the slots of the request, and the parts of speech."""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from experiments.networks.heads import Heads
from experiments.networks.text import PADDING, RecurrentEncoder, mean_over_text
from experiments.problems.classification import MISSING, adam_cosine, cross_entropy
from mtl_jax.compare.data import Batch
from mtl_jax.compare.metrics import accuracy, entity_f1
from mtl_jax.compare.problem import Problem, Task

FILES = {"train": "train.jsonl", "validation": "dev.jsonl", "test": "test.jsonl"}
UNKNOWN = PADDING + 1
"""The id of a word that is not in the vocabulary."""

Sentence = Mapping[str, Any]


def atis(data_dir: str | None = None) -> Problem:
    """Build the three tasks over requests for flights.

    ``intent`` is one of 21 classes for the sentence; two intents at once, such as
    ``atis_flight#atis_airfare``, are a class of their own. ``slots`` has one of 120 tags for each
    word, ``O`` or ``B-fromloc.city_name`` and the like. ``upos`` has one of 14 universal parts of
    speech for each word; 8 % of the sentences have none. The losses of ``slots`` and ``upos`` are
    means over all words of the batch that have the label, so that a word counts the same in a short
    sentence and in a long one.

    The folder holds ``train.jsonl`` (4,478 sentences), ``dev.jsonl`` (500, for validation) and
    ``test.jsonl`` (893). A line is a sentence, a JSON object: ``tokens``, the words; ``slots``, a
    tag for each word, in the form B-I-O; ``intent``; and, where they are known, ``upos``, a part of
    speech for each word. Other entries are not read. Words, tags and intents in the split of Goo et
    al. are in many places, such as the folder ``data/atis`` of
    https://github.com/monologg/JointBERT; the parts of speech are those of the treebank
    https://github.com/UniversalDependencies/UD_English-Atis, for the sentences of the same words.

    The vocabulary is that of the training sentences. A word that occurs there only once is read as
    an unknown one, so that the vector of unknown words is trained. Intents and tags of which there
    is no training sentence are not among the classes that the network can answer with: they count
    as wrong, and their entities as missed. The split is the published one, in which 52 sentences of
    ``dev.jsonl`` and 13 of ``test.jsonl`` are training sentences too.

    Published for the same test sentences, in %:

    ========================================== ====== ========
    network                                    intent slots F1
    ========================================== ====== ========
    joint sequence (Hakkani-Tur et al., 2016)  92.6   94.2
    attention (Liu and Lane, 2016)             91.1   94.2
    slot-gated (Goo et al., 2018)              93.6   94.8
    JointBERT (Chen et al., 2019)              97.87  95.59
    ========================================== ====== ========

    The first three are recurrent networks, in numbers of the README of
    https://github.com/czhang99/Capsule-NLU; the last one, which is pretrained, in those of
    JointBERT's at the address above. Ours is comparable in kind, not in detail: other networks,
    which do not learn the parts of speech.

    Args:
      data_dir: the folder that holds the three files.

    Returns:
      The problem, with the tasks ``intent``, ``slots`` and, if a training sentence has them,
      ``upos``.

    Raises:
      FileNotFoundError: if there is no such folder or a file is missing.
      ValueError: if a line is not a sentence as above.

    References:
      Hemphill et al., `The ATIS Spoken Language Systems Pilot Corpus
      <https://aclanthology.org/H90-1021>`_, 1990; Goo et al., `Slot-Gated Modeling for Joint Slot
      Filling and Intent Prediction <https://aclanthology.org/N18-2118>`_, 2018; Chen et al., `BERT
      for Joint Intent Classification and Slot Filling <https://arxiv.org/abs/1902.10909>`_, 2019
    """
    sentences = read_sentences(data_dir)
    words = vocabulary(sentences["train"])
    names = {task: label_names(task, sentences) for task in ("intent", "slots", "upos")}
    seen = {task: len(label_names(task, {"train": sentences["train"]})) for task in names}
    tasks = [task for task, number in seen.items() if number]
    length = max(len(sentence["tokens"]) for split in sentences.values() for sentence in split)
    splits: Any = {part: fields(split, words, names, length) for part, split in sentences.items()}
    encoder = RecurrentEncoder(len(words) + 2, embedding=64, width=64, dropout=0.2)
    heads = Heads({task: seen[task] for task in tasks})

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, heads_key = jax.random.split(key)
        ids = jnp.asarray(splits["train"]["ids"][:1])
        z, variables = encoder.init_with_output(encoder_key, ids)
        head_inputs = {task: z if task != "intent" else z[:, 0] for task in tasks}
        heads_variables = heads.init(heads_key, head_inputs)
        return {"encoder": variables["params"], "heads": heads_variables["params"]}, {}

    def encode(
        params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        variables = {"params": params["encoder"]}
        z = encoder.apply(variables, batch["ids"], train=True, rngs={"dropout": key})
        return z, model_state

    def logits_of(params: PyTree, zs: Mapping[str, PyTree], batch: Batch) -> dict[str, Array]:
        zs = {**zs, "intent": mean_over_text(zs["intent"], batch["ids"])}
        logits = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(logits, dict)
        return logits

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        logits = logits_of(params, zs, batch)
        return {task: cross_entropy(logits[task], batch[task]) for task in tasks}

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Array]:
        z = encoder.apply({"params": params["encoder"]}, batch["ids"])
        logits = logits_of(params, dict.fromkeys(tasks, z), batch)
        # The metrics know all names, those without a training sentence too.
        return {
            task: jnp.pad(
                values,
                [(0, 0)] * (values.ndim - 1) + [(0, len(names[task]) - seen[task])],
                constant_values=-jnp.inf,
            )
            for task, values in logits.items()
        }

    def labelled(batch: Batch) -> dict[str, Bool[Array, "batch"]]:
        return {
            task: (batch[task] != MISSING).reshape(len(batch[task]), -1).any(axis=1)
            for task in tasks
        }

    metric_of = {
        "intent": accuracy(),
        "slots": entity_f1(names["slots"], ignore=MISSING),
        "upos": accuracy(ignore=MISSING),
    }
    return Problem(
        name="atis",
        description="Requests for flights: what is wanted, which words say where, when and how, "
        "and which part of speech is each word?",
        tasks={task: Task(metric_of[task]) for task in tasks},
        **splits,
        init=init,
        encoder=encode,
        heads=losses_of,
        shared=lambda path: path.startswith("encoder/"),
        predict=predict,
        labelled=labelled,
        optimizer=adam_cosine,
        learning_rate=3e-2,
        epochs=6,
        batch_size=64,
    )


def read_sentences(data_dir: str | None) -> dict[str, list[Sentence]]:
    """The sentences of the three splits, as the files have them."""
    folder = None if data_dir is None else pathlib.Path(data_dir)
    if folder is None or not all((folder / name).is_file() for name in FILES.values()):
        raise FileNotFoundError(
            f"The problem 'atis' reads {', '.join(FILES.values())} in the folder given with "
            f"--data-dir; got {data_dir}. A line is a JSON object with tokens, slots, intent and, "
            "where they are known, upos: from data/atis of https://github.com/monologg/JointBERT, "
            "and https://github.com/UniversalDependencies/UD_English-Atis for upos."
        )
    found: dict[str, list[Sentence]] = {}
    for part, name in FILES.items():
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        found[part] = [
            _sentence(line, f"{folder / name}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
    return found


def _sentence(line: str, where: str) -> Sentence:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    entries = found.items() if isinstance(found, dict) else ()
    sentence = {key: value for key, value in entries if value is not None}
    if not {"tokens", "slots", "intent"} <= set(sentence):
        got = list(sentence) or found
        raise ValueError(f"{where}: tokens, slots and intent are wanted; got {got}.")
    number = len(sentence["tokens"])
    if not number:
        raise ValueError(f"{where}: there are no tokens.")
    for task in ("slots", "upos"):
        tags = sentence.get(task, sentence["tokens"])
        if len(tags) != number:
            raise ValueError(f"{where}: {number} tokens have {len(tags)} {task}.")
    return sentence


def vocabulary(sentences: Iterable[Sentence]) -> dict[str, int]:
    """The ids of the words that occur more than once, after :data:`UNKNOWN`."""
    counts = collections.Counter(word for sentence in sentences for word in sentence["tokens"])
    words = sorted(word for word, count in counts.items() if count > 1)
    return {word: number for number, word in enumerate(words, UNKNOWN + 1)}


def label_names(task: str, sentences: Mapping[str, Iterable[Sentence]]) -> list[str]:
    """The classes of a task: those of the training sentences, then those that others have."""
    names: list[str] = []
    for split in sentences.values():  # the training sentences are first
        found: set[str] = set()
        for sentence in split:
            labels = sentence.get(task, [])
            found.update([labels] if task == "intent" else labels)
        names += sorted(found.difference(names))
    return names


def fields(
    sentences: Sequence[Sentence],
    words: Mapping[str, int],
    names: Mapping[str, Sequence[str]],
    length: int,
) -> dict[str, np.ndarray]:
    """The fields ``ids``, ``intent``, ``slots`` and ``upos`` of sentences.

    Args:
      sentences: as :func:`read_sentences` gives them.
      words: the ids of the words.
      names: the classes of each task.
      length: what all sentences are padded to: the ids with :data:`PADDING`, tags with
        :data:`MISSING`.
    """
    found = {
        "ids": np.full((len(sentences), length), PADDING, np.int32),
        "intent": np.array([names["intent"].index(s["intent"]) for s in sentences], np.int32),
        "slots": np.full((len(sentences), length), MISSING, np.int32),
        "upos": np.full((len(sentences), length), MISSING, np.int32),
    }
    for row, sentence in enumerate(sentences):
        ids = [words.get(word, UNKNOWN) for word in sentence["tokens"]]
        found["ids"][row, : len(ids)] = ids
        for task in ("slots", "upos"):
            tags = [names[task].index(tag) for tag in sentence.get(task, [])]
            found[task][row, : len(tags)] = tags
    return found
