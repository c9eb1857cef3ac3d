"""AG News: the topic of a news story, and the agency that wrote it."""

import html
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from experiments.networks.text import ConvTextEncoder, hashed_ids
from experiments.problems.classification import MISSING, classification
from experiments.problems.prepared import hold_out, prepared_examples
from mtl_jax.compare.problem import Problem

AGENCIES = ("AP", "AFP", "Reuters")
BUCKETS = 16_384
MAX_WORDS = 64

# `doesn #39;t`, ` quot;so quot;`: the data set has lost the ampersands of most entities.
_BARE_ENTITY = re.compile(r"\s?(?<!&)(#\d+|\b[a-zA-Z]+);")
_MARKUP = re.compile(r"<[^>]*>")
# `AP - The story` under the title `The title (AP)`.
_BYLINE = re.compile(r"^(.{2,40}?) - ")
# `By ALEX VEIGA LOS ANGELES (AP) -- The story`, `NEW YORK, Aug 17 (Reuters) - The story`.
_DATELINE = re.compile(r"^[^()]{0,80}\((AP|AFP|(?i:Reuters))\)[\s:-]*")
_NAMES = re.compile(
    r"\b(?:AP|AFP|(?i:Reuters|Associated Press|Agence France[ -]Presse|Agence France))\b"
)
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def ag_news(data_dir: str | None = None) -> Problem:
    """Build AG News with the topic and, where the text names it, the news agency.

    The agency is read from the story's own tag, and the tag is then taken out of the title and the
    text (:func:`split_tag`). Stories with another tag or none have no label. A tenth of the
    training stories is held out for validation.

    The data set is ``ag_news_subset`` of tensorflow-datasets, a subset of the collection of stories
    and the whole of what is known as AG News: 120,000 training and 7,600 test stories. All that is
    prepared in ``data_dir`` is used. To have the full size, give a folder where nothing is prepared
    yet, with TensorFlow installed: it is downloaded and prepared there.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.

    Returns:
      The problem, with the tasks ``topic`` (4 classes) and ``agency`` (AP, AFP, Reuters).

    Raises:
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.

    References:
      Zhang et al., `Character-level Convolutional Networks for Text Classification
      <https://arxiv.org/abs/1509.01626>`_, 2015
    """
    return classification(
        name="ag_news",
        description="A news story; what is it about, and which agency wrote it?",
        classes={"topic": 4, "agency": len(AGENCIES)},
        splits=stories(data_dir, lambda texts: hashed_ids(map(words, texts), BUCKETS, MAX_WORDS)),
        inputs=lambda batch: batch["ids"],
        encoder=ConvTextEncoder(BUCKETS, embedding=32, width=64, window=3),
        learning_rate=5e-3,
        epochs=3,
        batch_size=128,
    )


def stories(
    data_dir: str | None, to_ids: Callable[[Iterable[str]], np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """The splits of the data, with the fields ``ids``, ``topic`` and ``agency``.

    Args:
      data_dir: as in :func:`ag_news`.
      to_ids: makes the ids of the plain texts.
    """
    splits = prepared_examples("ag_news_subset", data_dir)
    train, validation = hold_out(_read(splits["train"], to_ids))
    return {"train": train, "validation": validation, "test": _read(splits["test"], to_ids)}


def split_tag(title: str, description: str) -> tuple[str, str | None]:
    """A story without its agency's tag, and the agency.

    The tag is a dateline (``NEW YORK (Reuters) -``) at the start of the description, or a byline
    (``AP -``) there that the title repeats at its end (``(AP)``). It is taken out whole, the place
    included. The names of the agencies are taken out wherever else they stand, whether the story
    has a tag or not.

    Args:
      title: the title, as the data set has it.
      description: the description, as the data set has it.

    Returns:
      The title and the description as one plain text, and the agency, ``None`` if there is no tag
      or that of another source.
    """
    title, description = plain_text(title), plain_text(description)
    source = None
    byline = _BYLINE.match(description)
    if byline and title.endswith(f"({byline[1]})"):
        source = byline[1]
        title = title.removesuffix(f"({source})")
        description = description[byline.end() :]
    dateline = _DATELINE.match(description)
    if dateline:
        source = source if source in AGENCIES else dateline[1]
        description = description[dateline.end() :]
    text = " ".join(_NAMES.sub(" ", f"{title} {description}").split())
    names = {agency.lower(): agency for agency in AGENCIES}
    return text, names.get(source.lower()) if source else None


def plain_text(text: str) -> str:
    """The text with its entities read, and without markup, backslashes and line breaks."""
    text = html.unescape(_BARE_ENTITY.sub(_restored, text))
    return " ".join(_MARKUP.sub(" ", text).replace("\\", " ").split())


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def _restored(match: re.Match[str]) -> str:
    entity = f"&{match[1]};"
    # Of what is no entity, a beginning may be one: &centuries;
    return match[0] if html.unescape(entity).endswith(";") else entity


def _read(
    examples: list[dict[str, Any]], to_ids: Callable[[Iterable[str]], np.ndarray]
) -> dict[str, np.ndarray]:
    texts, agencies = zip(
        *(
            split_tag(example["title"].decode(), example["description"].decode())
            for example in examples
        ),
        strict=True,
    )
    return {
        "ids": to_ids(texts),
        "topic": np.array([example["label"] for example in examples], np.int32),
        "agency": np.array(
            [MISSING if agency is None else AGENCIES.index(agency) for agency in agencies],
            np.int32,
        ),
    }
