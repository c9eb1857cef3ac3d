import collections

import numpy as np
import pytest

from experiments.problems.utterances import RARE, corpus, distinct_texts, ngram_ids, utterances


@pytest.fixture(scope="module")
def texts():
    return distinct_texts()


@pytest.fixture(scope="module")
def problem():
    return utterances()


def test_texts_are_normalised_and_their_labels_are_those_of_the_corpus(texts):
    found = collections.defaultdict(set)
    for text, labels in corpus():
        found[text].add(labels)
    assert 12_000 < len(texts) < 14_000
    for text, labels in texts.items():
        assert text == " ".join(text.split()).casefold()
        assert found[text] == {labels}


def test_rare_classes_are_dropped(texts):
    for task in (0, 1, 2):
        counts = collections.Counter(labels[task] for labels in texts.values())
        # Counted before the texts that are rare by their other label go.
        assert min(counts.values()) >= RARE / 2
    languages = {labels[0] for labels in texts.values()}
    assert {"english", "japanese"} <= languages
    assert "thai" not in languages


def test_splits_share_no_text(problem, texts):
    sizes = {split: problem.size(split) for split in ("train", "validation", "test")}
    assert sum(sizes.values()) == len(texts)
    assert sizes["test"] == 2 * sizes["validation"]


def test_labels_and_ids_belong_to_the_texts(problem, texts):
    """All three labels and the ids, as a multiset over the splits, are those of the texts."""
    names = [sorted({labels[task] for labels in texts.values()}) for task in range(3)]
    ids = ngram_ids(texts, 128)
    expected = collections.Counter(
        (row.tobytes(), *(names[task].index(labels[task]) for task in range(3)))
        for row, labels in zip(ids, texts.values(), strict=True)
    )
    found = collections.Counter()
    for split in (problem.train, problem.validation, problem.test):
        assert split["ids"].shape[1] == 128
        assert (split["ids"][:, 0] != 0).all()
        rows = [row.tobytes() for row in split["ids"]]
        labels = [split[task].tolist() for task in ("language", "topic", "role")]
        found.update(zip(rows, *labels, strict=True))
    assert found == expected


def test_problem_trains(check_problem):
    problem = utterances(max_texts=600)
    assert problem.size("train") == 420
    assert problem.labelled is None
    check_problem(problem)


def test_the_same_data_at_every_call(problem):
    again = utterances()
    for field, values in problem.test.items():
        np.testing.assert_array_equal(values, again.test[field])
