"""Every metric against scikit-learn, SciPy or a slow definition, over padded batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mtl_jax.compare import (
    Metric,
    accuracy,
    average_precision,
    correlation,
    entity_f1,
    f1,
    mean_absolute_error,
    mean_iou,
    mean_of,
    r2,
    relative_error,
    relative_l2,
    roc_auc,
    root_mean_squared_error,
)

NUMBER, BATCH = 22, 8
TAGS = ("O", "B-place", "I-place", "B-time", "I-time")


def over(metric, output, label, counted=None, batch_size=BATCH):
    """The metric of a split in batches, the last one filled up with what must not count."""
    number = len(label)
    counted = np.full(number, True) if counted is None else counted
    statistics, found = jax.jit(metric.statistics), []
    for start in range(0, number, batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < number
        rows = np.where(real, rows, 0)
        there = jnp.asarray(counted[rows] & real)
        found.append((statistics(output[rows], label[rows], there), there))
    return metric.over(found)


def classes(rng, *shape, number=4):
    """Logits and labels that agree more often than not."""
    label = rng.integers(0, number, shape)
    logits = rng.normal(size=(*shape, number)) + 1.5 * np.eye(number)[label]
    return logits.astype(np.float32), label


def binary(rng, *shape):
    label = rng.integers(0, 2, shape)
    return (rng.normal(size=shape) + label).round(1).astype(np.float32), label  # with ties


def numbers(rng, *shape):
    label = 3 + rng.normal(size=shape)
    return (label + rng.normal(size=shape)).astype(np.float32), label.astype(np.float32)


def slow_iou(label, answer, ignored=()):
    scores = []
    for c in set(label) | set(answer):
        if c not in ignored:
            scores.append(
                np.sum((label == c) & (answer == c)) / np.sum((label == c) | (answer == c))
            )
    return np.mean(scores)


def slow_entity_f1(labels, answers):
    """Every span is asked for whether it is one: of a type, and not to be lengthened."""

    def spans(tags):
        found = set()
        for start, end in itertools.combinations(range(len(tags) + 1), 2):
            kind = tags[start][2:]
            begins = tags[start].startswith("B-") or start == 0 or tags[start - 1][2:] != kind
            inside = all(tag == f"I-{kind}" for tag in tags[start + 1 : end])
            ends = end == len(tags) or tags[end] != f"I-{kind}"
            if kind and begins and inside and ends:
                found.add((kind, start, end))
        return found

    pairs = [(spans(a), spans(b)) for a, b in zip(labels, answers, strict=True)]
    both = sum(len(a & b) for a, b in pairs)
    return 2 * both / sum(len(a) + len(b) for a, b in pairs)


def of_classes(function, *, ignore=None):
    """The reference on the elements that count, as one series."""

    def expected(output, label):
        answer = output.argmax(-1) if output.ndim > label.ndim else (output > 0).astype(int)
        valid = np.full(label.shape, True) if ignore is None else label != ignore
        return function(label[valid], answer[valid])

    return expected


CASES = {
    "accuracy": (accuracy(), classes, (), of_classes(sk.accuracy_score)),
    "accuracy of a logit": (accuracy(), binary, (), of_classes(sk.accuracy_score)),
    "pixel accuracy": (
        accuracy(ignore=0, name="pixel accuracy"),
        classes,
        (3, 2),
        of_classes(sk.accuracy_score, ignore=0),
    ),
    "mIoU": (mean_iou(4), classes, (3, 2), of_classes(slow_iou)),
    "mIoU against Jaccard": (
        mean_iou(4),
        classes,
        (),
        of_classes(lambda label, answer: sk.jaccard_score(label, answer, average="macro")),
    ),
    "mIoU without a class": (
        mean_iou(4, ignore=2),
        classes,
        (3, 2),
        of_classes(lambda label, answer: slow_iou(label, answer, [2]), ignore=2),
    ),
    "F1": (f1(), binary, (), of_classes(sk.f1_score)),
    "F1 of two logits": (
        f1(),
        lambda rng, *shape: classes(rng, *shape, number=2),
        (),
        of_classes(sk.f1_score),
    ),
    **{
        f"{average} F1": (
            f1(average, ignore=3),
            classes,
            (5,),
            of_classes(lambda *a, average=average: sk.f1_score(*a, average=average), ignore=3),
        )
        for average in ("macro", "micro", "weighted")
    },
    "entity F1": (
        entity_f1(TAGS),
        lambda rng, *shape: classes(rng, *shape, number=5),
        (6,),
        lambda output, label: slow_entity_f1(*np.array(TAGS)[[label, output.argmax(-1)]]),
    ),
    "ROC-AUC": (roc_auc(), binary, (), lambda x, y: sk.roc_auc_score(y, x)),
    "ROC-AUC of two logits": (
        roc_auc(ignore=-1),
        lambda rng, *shape: classes(rng, *shape, number=2),
        (3,),
        lambda x, y: sk.roc_auc_score(y.ravel(), (x[..., 1] - x[..., 0]).ravel()),
    ),
    "average precision": (
        average_precision(),
        binary,
        (),
        lambda x, y: sk.average_precision_score(y, x),
    ),
    "absolute error": (
        mean_absolute_error(scale=10, unit="cm"),
        numbers,
        (3, 2),
        lambda x, y: 10 * sk.mean_absolute_error(y.ravel(), x.ravel()),
    ),
    "RMSE": (
        root_mean_squared_error(scale=0.5),
        numbers,
        (4,),
        lambda x, y: 0.5 * sk.root_mean_squared_error(y.ravel(), x.ravel()),
    ),
    "relative error": (
        relative_error(),
        numbers,
        (),
        lambda x, y: sk.mean_absolute_percentage_error(y, x),
    ),
    "relative L2 error": (
        relative_l2(),
        numbers,
        (3,),
        lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y),
    ),
    "R2": (r2(), numbers, (), lambda x, y: sk.r2_score(y, x)),
    "R2 of several outputs": (
        r2(),
        numbers,
        (2, 2),
        lambda x, y: np.mean(
            [
                1 - np.sum((x - y)[:, i, j] ** 2) / np.sum((y - y.mean(0))[:, i, j] ** 2)
                for i in range(2)
                for j in range(2)
            ]
        ),
    ),
    "Pearson correlation": (
        correlation(),
        numbers,
        (2,),
        lambda x, y: stats.pearsonr(x.ravel(), y.ravel())[0],
    ),
    "Spearman correlation": (
        correlation("spearman"),
        binary,
        (),
        lambda x, y: stats.spearmanr(x, y)[0],
    ),
    "mean": (
        mean_of(lambda x, y: jnp.sqrt(jnp.sum((x - y) ** 2, axis=-1)), "distance"),
        numbers,
        (3,),
        lambda x, y: np.mean(np.linalg.norm(x - y, axis=-1)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_metric_of_the_labelled_examples_of_several_batches(case):
    metric, make, shape, expected = CASES[case]
    rng = np.random.default_rng(3)
    output, label = make(rng, NUMBER, *shape)
    assert np.isclose(over(metric, output, label), expected(output, label), rtol=1e-5)
    counted = rng.uniform(size=NUMBER) < 0.7
    # What does not count may be anything.
    spoilt = np.where(counted.reshape(-1, *(1,) * len(shape)), label, np.array(-1, label.dtype))
    if label.dtype == np.float32:
        spoilt[~counted] = np.nan
    value = over(metric, output, spoilt, counted)
    assert np.isclose(value, expected(output[counted], label[counted]), rtol=1e-5)
    assert not np.isclose(value, expected(output, label), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_without_any_label_a_metric_is_nan(case):
    metric, make, shape, _ = CASES[case]
    output, label = make(np.random.default_rng(0), BATCH, *shape)
    assert np.isnan(over(metric, output, label, np.full(BATCH, False)))


@pytest.mark.parametrize(
    "metric", [mean_absolute_error, root_mean_squared_error, relative_error, relative_l2]
)
@pytest.mark.parametrize("unknown", [0.0, np.nan])
def test_unknown_elements_do_not_count_in_an_error(metric, unknown):
    output, label = numbers(np.random.default_rng(1), NUMBER, 3)
    known = np.random.default_rng(2).uniform(size=label.shape) < 0.6
    found = over(metric(ignore=unknown), output, np.where(known, label, np.float32(unknown)))
    assert np.isclose(found, over(metric(), output[known], label[known]), rtol=1e-5)


@pytest.mark.parametrize("metric", [roc_auc, average_precision])
def test_unknown_elements_do_not_count_in_a_ranking(metric):
    output, label = binary(np.random.default_rng(1), NUMBER)
    known = np.random.default_rng(2).uniform(size=label.shape) < 0.6
    found = over(metric(ignore=-1), output, np.where(known, label, -1))
    expected = over(metric(), output[known], label[known])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found != over(metric(), output, label)


def test_relative_error_leaves_out_labels_of_zero():
    output, label = np.array([1.0, 3.0, 5.0], np.float32), np.array([0.0, 2.0, 4.0], np.float32)
    np.testing.assert_allclose(over(relative_error(), output, label), (1 / 2 + 1 / 4) / 2)


def test_relative_l2_of_labels_that_are_all_zero_is_nan():
    zeros = np.zeros(NUMBER, np.float32)
    assert np.isnan(over(relative_l2(), zeros + 1, zeros))
    assert over(relative_l2(), zeros, zeros + 1) == 1


def test_ignored_labels_outside_the_range_of_bytes_and_of_classes():
    logits, label = classes(np.random.default_rng(0), NUMBER, 3)
    void = np.where(label == 1, 255, label).astype(np.uint8)
    for ignore in (255, -1):
        metric = accuracy(ignore=ignore)
        valid = void != ignore
        expected = np.mean((logits.argmax(-1) == void)[valid])
        np.testing.assert_allclose(over(metric, logits, void), expected, rtol=1e-6)
    expected = slow_iou(void[void != 255], logits.argmax(-1)[void != 255])
    np.testing.assert_allclose(over(mean_iou(4, ignore=255), logits, void), expected, rtol=1e-6)
    number = np.sum(void == 255)
    with pytest.raises(ValueError, match=f"mIoU: {number} labels are no class from 0 to 3"):
        over(mean_iou(4), logits, void)


def test_the_published_example_of_entities():
    """That of seqeval's documentation: F1 0.5, https://github.com/chakki-works/seqeval."""
    tags = ("O", "B-MISC", "I-MISC", "B-PER", "I-PER")
    label = np.array([[0, 0, 0, 1, 2, 2, 0], [3, 4, 0, -1, -1, -1, -1]])
    answer = np.array([[0, 0, 1, 2, 2, 2, 0], [3, 4, 0, 1, 1, 1, 1]])
    logits = np.eye(5, dtype=np.float32)[answer]
    assert over(entity_f1(tags, ignore=-1), logits, label) == 0.5


def test_ignored_positions_are_taken_out_of_a_sequence():
    """As the further pieces of a word that was cut in pieces: they do not end a span."""
    tags = ("O", "B-x", "I-x")
    label, answer = np.array([[1, -1, 2, 0]]), np.array([[1, 0, 2, 0]])
    assert over(entity_f1(tags, ignore=-1), np.eye(3, dtype=np.float32)[answer], label) == 1


@pytest.mark.parametrize("metric", [roc_auc(), average_precision(), correlation(), r2()])
@pytest.mark.parametrize("constant", [0, 1])
def test_one_class_or_constant_labels(metric, constant):
    output = np.random.default_rng(0).normal(size=BATCH).astype(np.float32)
    value = over(metric, output, np.full(BATCH, constant))
    if metric.name == "average precision" and constant:
        assert value == 1  # precision is 1 at every recall
    else:
        assert np.isnan(value)


@pytest.mark.parametrize("metric", [roc_auc(), average_precision(), correlation(), r2()])
def test_outputs_that_are_not_finite(metric):
    label = np.arange(BATCH) % 2
    for bad in (np.nan, np.inf):
        output = np.linspace(0, 1, BATCH, dtype=np.float32)
        output[2] = bad
        assert np.isnan(over(metric, output, label))


def test_f1_without_a_positive_is_undefined():
    label = np.zeros(BATCH, int)
    assert np.isnan(over(f1(), np.full(BATCH, -1.0, np.float32), label))
    assert over(f1(), np.full(BATCH, 1.0, np.float32), label) == 0


def test_sums_are_added_in_float64():
    metric = mean_of(lambda output, label: output, "mean")
    one, counted = {"total": jnp.float32(2**24), "number": jnp.int32(2**24)}, jnp.full(1, True)
    small = {"total": jnp.float32(1), "number": jnp.int32(0)}
    assert metric.over([(one, counted), (small, counted)]) * 2**24 == 2**24 + 1


def test_outputs_of_low_precision_are_summed_in_float32():
    output = jnp.full(512, 1.0, jnp.bfloat16)
    statistics = mean_absolute_error().statistics(output, jnp.zeros(512), jnp.full(512, True))
    assert statistics["total"].dtype == jnp.float32
    assert statistics["total"] == 512


@pytest.mark.parametrize(
    ("metric", "output", "label", "message"),
    [
        (accuracy(), (4, 3, 2), (4,), "accuracy: the output must have the label's shape, .4,., or"),
        (mean_iou(3), (4, 2), (4,), r"mIoU: .* an axis of 3 classes, \(4, 3\); got \(4, 2\)"),
        (accuracy(), (4, 1), (4,), r"or one more axis, of at least two classes; got .4, 1."),
        (f1("macro"), (4, 1), (4,), r"F1: the output must have the label's shape, .4,., or one"),
        (f1(), (4, 3), (4,), "there are two classes"),
        (entity_f1(TAGS), (4, 5), (4,), r"entity F1: labels \[batch, length\]"),
        (roc_auc(), (4, 3), (4,), r"ROC-AUC: a label is yes \(1\) or no \(0\)"),
        (r2(), (4, 1), (4,), "R2: output and label must have the same shape"),
        (mean_absolute_error(), (4, 1), (4,), "absolute error: output and label must"),
        (mean_of(lambda x, y: x.sum(), "sum"), (4,), (4,), r"'sum': .* each of the 4 examples"),
    ],
)
def test_shapes_that_do_not_fit_are_an_error_when_it_is_traced(metric, output, label, message):
    arguments = (
        jax.ShapeDtypeStruct(output, jnp.float32),
        jax.ShapeDtypeStruct(label, jnp.int32),
        jax.ShapeDtypeStruct((4,), bool),
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(metric.statistics, *arguments)


def test_arguments():
    with pytest.raises(ValueError, match="`classes` of mIoU must be at least 2, got 1"):
        mean_iou(1)
    with pytest.raises(ValueError, match="`average` of f1 must be"):
        f1("samples")
    with pytest.raises(ValueError, match="`kind` of correlation must be"):
        correlation("kendall")
    with pytest.raises(ValueError, match="O, B-type or I-type; got 'X-place'"):
        entity_f1(["O", "X-place"])
    with pytest.raises(ValueError, match="`scale` must be in"):
        mean_absolute_error(scale=0)
    with pytest.raises(TypeError, match="The metric 'm': `compute` must be a function"):
        Metric(name="m", statistics=lambda *args: args, compute=3)
