"""Metrics: what is measured of a task on a whole split, a batch at a time."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mtl_jax._checks import check_functions, check_option, read_number
from mtl_jax._tasks import at_least_float32
from mtl_jax._typing import PyTree

Statistics = Callable[[PyTree, PyTree, Bool[Array, "batch"]], PyTree]
"""From a network's output for a task, the label, and which examples count."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """One number for a task and a split, computed from batches.

    A batch is measured by ``statistics``, on the device; what is found in all batches of the split
    becomes one number by ``compute``, on the host. There are two kinds:

    - ``gather=False``: the statistics are sums over the batch, such as the number of correct
      answers and the number of answers. They are added up, in float64, and ``compute`` is given
      the totals. For means, and for whatever follows from a confusion matrix.
    - ``gather=True``: the statistics are arrays with the examples along the leading axis. Those of
      the examples that count are put together, and ``compute`` is given all of the split. For
      areas under curves, rank correlations, medians: whatever is not a function of sums.

    :func:`accuracy` and the functions beside it make the usual ones.

    Attributes:
      name: the name, for tables and pictures. A task's metrics have different names.
      higher_is_better: whether a larger number is a better one.
      unit: the unit that stands in tables. ``"%"`` is for a share, which is shown times 100.
      statistics: ``statistics(output, label, counted)``, traced by JAX. The output is what the
        problem's ``predict`` returns for the task: a pytree of arrays with the examples along the
        leading axis. ``counted`` (``bool[batch]``) says which are examples of the split that have
        the task's label; the others must not change a sum, and their label can be anything.
      compute: ``compute(statistics) -> float``, with NumPy arrays. NaN where the metric is
        undefined. An exception ends the comparison.
      gather: as above.

    Example:
      The median of the absolute errors, which needs all of them:

      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from mtl_jax.compare import Metric
      >>> median = Metric(
      ...     name="median error",
      ...     higher_is_better=False,
      ...     statistics=lambda output, label, counted: jnp.abs(output - label),
      ...     compute=lambda errors: np.median(errors) if errors.size else np.nan,
      ...     gather=True,
      ... )
      >>> every = jnp.array([True, True, True])
      >>> batches = [
      ...     (median.statistics(jnp.array([1.0, 2.0, 4.0]), jnp.zeros(3), every), every),
      ...     (median.statistics(jnp.array([8.0, 0.0, 0.0]), jnp.zeros(3), ~every), ~every),
      ... ]
      >>> median.over(batches)
      2.0
    """

    name: str
    higher_is_better: bool = True
    unit: str = ""
    statistics: Statistics
    compute: Callable[[Any], float]
    gather: bool = False

    def __post_init__(self) -> None:
        check_functions(
            f"The metric {self.name!r}", statistics=self.statistics, compute=self.compute
        )

    def over(self, batches: Iterable[tuple[PyTree, Any]]) -> float:
        """The metric of a split.

        Args:
          batches: of each batch the statistics, and which of its examples were counted. There is
            at least one.
        """
        if self.gather:
            kept = [_rows(found, np.asarray(counted)) for found, counted in batches]
            return float(self.compute(jax.tree.map(lambda *leaves: np.concatenate(leaves), *kept)))
        total: Any = None
        for found, _ in batches:
            found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
            total = found if total is None else jax.tree.map(np.add, total, found)
        return float(self.compute(total))


# Classes


def accuracy(*, ignore: int | None = None, name: str = "accuracy") -> Metric:
    r"""The share of correct answers.

    .. math:: \frac{1}{N} \sum_{i=1}^N [\arg\max_c z_{ic} = y_i]

    Args:
      ignore: the label of elements that do not count, such as pixels of no class or the padding of
        a sentence.
      name: the metric's name, such as ``"pixel accuracy"``.

    Returns:
      The metric, in %. The output is logits, ``[batch, ..., classes]``, and the label the number of
      a class, ``[batch, ...]``; or the output is one logit for each label, which is then 0 or 1.
      All elements of the split count alike.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import accuracy
      >>> metric = accuracy()
      >>> logits, counted = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]), jnp.ones(3, bool)
      >>> statistics = metric.statistics(logits, jnp.array([1, 1, 1]), counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.667
    """

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        valid = _valid(label, counted, ignore)
        correct = _classes(name, output, label) == label.astype(jnp.int32)
        return {"correct": jnp.sum(correct & valid), "number": jnp.sum(valid)}

    return Metric(
        name=name,
        unit="%",
        statistics=statistics,
        compute=lambda sums: _quotient(sums["correct"], sums["number"]),
    )


def mean_iou(classes: int, *, ignore: int | None = None, name: str = "mIoU") -> Metric:
    r"""The mean over the classes of intersection over union, as it is usual for segmentation.

    .. math:: \frac{1}{C} \sum_c \frac{n_{cc}}{\sum_j n_{cj} + \sum_j n_{jc} - n_{cc}}

    with the numbers :math:`n_{ij}` of elements of class i that are taken for class j, in the whole
    split. A class that is neither a label nor an answer anywhere is left out of the mean, as is the
    class that is ignored.

    Args:
      classes: the number of classes.
      ignore: the label of elements that do not count.
      name: the metric's name.

    Returns:
      The metric, in %. The output is logits, ``[batch, ..., classes]``, and the label the number of
      a class, ``[batch, ...]``. A label that is no class and not ignored is an error, on the host.

    Raises:
      ValueError: if ``classes`` is less than 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import mean_iou
      >>> metric = mean_iou(3, ignore=0)
      >>> logits, label = jnp.eye(3)[jnp.array([[1, 1, 2, 2]])], jnp.array([[1, 2, 2, 0]])
      >>> counted = jnp.ones(1, bool)
      >>> statistics = metric.statistics(logits, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.5
    """
    if classes < 2:
        raise ValueError(f"`classes` of {name} must be at least 2, got {classes}.")

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        if output.shape != (*label.shape, classes):
            raise ValueError(
                f"{name}: the output must have the label's shape and an axis of {classes} classes, "
                f"{(*label.shape, classes)}; got {output.shape}."
            )
        valid = _valid(label, counted, ignore)
        label = label.astype(jnp.int32)
        known = (label >= 0) & (label < classes)
        # The last cell takes what does not count.
        cells = jnp.where(valid & known, label * classes + output.argmax(axis=-1), classes**2)
        confusion = jnp.bincount(cells.ravel(), length=classes**2 + 1)[:-1]
        return {
            "confusion": confusion.reshape(classes, classes),
            "outside": jnp.sum(valid & ~known),
        }

    def compute(sums: dict[str, np.ndarray]) -> float:
        if sums["outside"]:
            raise ValueError(
                f"{name}: {int(sums['outside'])} labels are no class from 0 to {classes - 1}; give "
                "`ignore` if they are not to count."
            )
        matrix = sums["confusion"]
        both = np.diag(matrix)
        union = matrix.sum(axis=0) + matrix.sum(axis=1) - both
        used = union > 0
        if ignore is not None and 0 <= ignore < classes:
            used[ignore] = False
        return float(np.mean(both[used] / union[used])) if used.any() else math.nan

    return Metric(name=name, unit="%", statistics=statistics, compute=compute)


def f1(
    average: Literal["binary", "macro", "micro", "weighted"] = "binary",
    *,
    ignore: int | None = None,
    name: str | None = None,
) -> Metric:
    r"""The F1 score: the harmonic mean of precision and recall.

    .. math:: F_1 = \frac{2\,TP}{2\,TP + FP + FN}

    Args:
      average: ``"binary"`` for the F1 of class 1; with several classes ``"macro"`` for the mean
        over the classes, ``"weighted"`` for the mean by their frequency, ``"micro"`` for that of
        all together: as in ``sklearn.metrics.f1_score``.
      ignore: the label of elements that do not count.
      name: the metric's name; ``"F1"`` or ``"macro F1"`` and the like by default.

    Returns:
      The metric, in %. Output and label are as for :func:`accuracy`. It is NaN where no element is
      of class 1 or taken for it.

    Raises:
      ValueError: if ``average`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import f1
      >>> metric = f1()
      >>> logits, label = jnp.array([2.0, 1.0, -1.0, -3.0]), jnp.array([1, 0, 1, 0])
      >>> counted = jnp.ones(4, bool)
      >>> statistics = metric.statistics(logits, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.5
    """
    check_option(average, ("binary", "macro", "micro", "weighted"), "`average` of f1")
    name = name or ("F1" if average == "binary" else f"{average} F1")

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        if average == "binary" and output.shape not in (label.shape, (*label.shape, 2)):
            raise ValueError(
                f'{name}: with average="binary" there are two classes; got an output of shape '
                f"{output.shape} for labels of shape {label.shape}."
            )
        return {
            "answer": _classes(name, output, label),
            "label": label,
            "valid": _valid(label, counted, ignore),
        }

    def compute(found: dict[str, np.ndarray]) -> float:
        from sklearn.metrics import f1_score

        label, answer = _flat(found, "label", "answer")
        if not label.size:
            return math.nan
        score = f1_score(
            label.astype(int),
            answer.astype(int),
            average=average,
            zero_division=np.nan,  # pyright: ignore[reportArgumentType]
        )
        return float(score)

    return Metric(name=name, unit="%", statistics=statistics, compute=compute, gather=True)


def entity_f1(tags: Sequence[str], *, ignore: int | None = None, name: str = "entity F1") -> Metric:
    r"""The F1 score of whole spans of a sequence, as it is usual for named entities and slots.

    .. math:: F_1 = \frac{2\,|A \cap B|}{|A| + |B|}

    with the set A of all spans of the labels in the split, and the set B of those of the answers. A
    span is the same if its type and both its ends are. As in the evaluation of CoNLL-2000 a span
    starts with ``B-type``, and with ``I-type`` where no span of the type goes before it.

    Args:
      tags: the tag of each class: ``"O"``, ``"B-type"`` or ``"I-type"``.
      ignore: the label of positions that do not count, such as the padding. They are taken out of
        the sequence.
      name: the metric's name.

    Returns:
      The metric, in %. The output is logits, ``[batch, length, tags]``, and the label an integer
      for each position, ``[batch, length]``. It is NaN where there is no span at all.

    Raises:
      ValueError: if a tag has another form.

    References:
      Tjong Kim Sang and Buchholz, `Introduction to the CoNLL-2000 Shared Task: Chunking
      <https://aclanthology.org/W00-0726>`_, 2000

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import entity_f1
      >>> metric = entity_f1(["O", "B-city", "I-city"], ignore=-1)
      >>> logits, label = jnp.eye(3)[jnp.array([[1, 2, 0, 1]])], jnp.array([[1, 2, 0, -1]])
      >>> counted = jnp.ones(1, bool)
      >>> statistics = metric.statistics(logits, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      1.0
    """
    for tag in tags:
        if tag != "O" and tag[:2] not in ("B-", "I-"):
            raise ValueError(f"The tags of {name} must be O, B-type or I-type; got {tag!r}.")

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        if output.shape != (*label.shape, len(tags)) or label.ndim != 2:
            raise ValueError(
                f"{name}: labels [batch, length] and logits [batch, length, {len(tags)}] are "
                f"wanted; got {label.shape} and {output.shape}."
            )
        return {
            "answer": output.argmax(axis=-1),
            "label": label,
            "valid": _valid(label, counted, ignore),
        }

    def compute(found: dict[str, np.ndarray]) -> float:
        both = total = 0
        rows = zip(found["label"], found["answer"], found["valid"], strict=True)
        for label, answer, valid in rows:
            wanted, given = (
                _spans([str(tags[tag]) for tag in row[valid].tolist()]) for row in (label, answer)
            )
            both += len(wanted & given)
            total += len(wanted) + len(given)
        return _quotient(2 * both, total)

    return Metric(name=name, unit="%", statistics=statistics, compute=compute, gather=True)


# Ranks


def roc_auc(*, ignore: float | None = None, name: str = "ROC-AUC") -> Metric:
    r"""The area under the receiver operating characteristic of a binary label.

    That is the share of pairs of a positive and a negative example in which the positive one has
    the higher logit, ties counting half:

    .. math:: \frac{1}{N_1 N_0} \sum_{i: y_i = 1} \sum_{j: y_j = 0}
       \big([z_i > z_j] + \tfrac{1}{2} [z_i = z_j]\big)

    Args:
      ignore: the label of elements that do not count.
      name: the metric's name.

    Returns:
      The metric, in %. The output is one logit for each label, or two, ``[batch, ..., 2]``; the
      label is 0 or 1. It is NaN if all labels are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import roc_auc
      >>> metric = roc_auc()
      >>> score, label = jnp.array([0.9, 0.2, 0.4, 0.1]), jnp.array([1, 0, 0, 1])
      >>> counted = jnp.ones(4, bool)
      >>> statistics = metric.statistics(score, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.5
    """

    def compute(label: np.ndarray, score: np.ndarray) -> float:
        from sklearn.metrics import roc_auc_score

        return math.nan if label.all() else float(roc_auc_score(label, score))

    return _of_scores(name, ignore, compute)


def average_precision(*, ignore: float | None = None, name: str = "average precision") -> Metric:
    r"""The average precision of a binary label: the area under precision by recall, in steps.

    .. math:: \sum_n (R_n - R_{n-1}) P_n

    Args:
      ignore: the label of elements that do not count.
      name: the metric's name.

    Returns:
      The metric, in %. Output and label are as for :func:`roc_auc`. It is NaN without a positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import average_precision
      >>> metric = average_precision()
      >>> score, label = jnp.array([0.9, 0.2, 0.4, 0.1]), jnp.array([1, 0, 0, 1])
      >>> counted = jnp.ones(4, bool)
      >>> statistics = metric.statistics(score, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.75
    """

    def compute(label: np.ndarray, score: np.ndarray) -> float:
        from sklearn.metrics import average_precision_score

        return float(average_precision_score(label, score))

    return _of_scores(name, ignore, compute)


# Numbers


def mean_absolute_error(
    *,
    scale: float = 1.0,
    unit: str = "",
    ignore: float | None = None,
    name: str = "absolute error",
) -> Metric:
    r"""The mean absolute error.

    .. math:: \frac{s}{N} \sum_{i=1}^N |\hat{y}_i - y_i|

    Args:
      scale: what the errors are multiplied by, such as the deviation that the labels were divided
        by.
      unit: the unit of a label times the scale.
      ignore: the label of elements that do not count, such as pixels without a depth; it can be
        NaN.
      name: the metric's name.

    Returns:
      The metric, lower being better. Output and label have the same shape, ``[batch, ...]``; all
      elements of the split count alike.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import mean_absolute_error
      >>> metric = mean_absolute_error(scale=100, unit="cm", ignore=0)
      >>> counted = jnp.array([True, True])
      >>> depth, label = jnp.array([[2.0, 1.0], [1.5, 3.0]]), jnp.array([[2.5, 0.0], [1.5, 0.0]])
      >>> metric.over([(metric.statistics(depth, label, counted), counted)])
      25.0
    """
    scale = read_number(scale, "`scale`", "(0, inf)")

    def compute(sums: dict[str, np.ndarray]) -> float:
        return scale * _quotient(sums["total"], sums["number"])

    errors = _elements(name, lambda output, label: jnp.abs(output - label), ignore)
    return Metric(name=name, higher_is_better=False, unit=unit, statistics=errors, compute=compute)


def root_mean_squared_error(
    *, scale: float = 1.0, unit: str = "", ignore: float | None = None, name: str = "RMSE"
) -> Metric:
    r"""The root of the mean squared error.

    .. math:: s \sqrt{\frac{1}{N} \sum_{i=1}^N (\hat{y}_i - y_i)^2}

    Args:
      scale: as for :func:`mean_absolute_error`.
      unit: as for :func:`mean_absolute_error`.
      ignore: as for :func:`mean_absolute_error`.
      name: the metric's name.

    Returns:
      The metric, lower being better. Output and label have the same shape, ``[batch, ...]``; the
      mean is over all elements of the split.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import root_mean_squared_error
      >>> metric = root_mean_squared_error(unit="m")
      >>> output, label = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 2.0, 6.0])
      >>> counted = jnp.ones(3, bool)
      >>> statistics = metric.statistics(output, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      1.732
    """
    scale = read_number(scale, "`scale`", "(0, inf)")

    def compute(sums: dict[str, np.ndarray]) -> float:
        return scale * math.sqrt(_quotient(sums["total"], sums["number"]))

    errors = _elements(name, lambda output, label: (output - label) ** 2, ignore)
    return Metric(name=name, higher_is_better=False, unit=unit, statistics=errors, compute=compute)


def relative_error(
    *, unit: str = "", ignore: float | None = None, name: str = "relative error"
) -> Metric:
    r"""The mean of the absolute errors as shares of the labels.

    .. math:: \frac{1}{N} \sum_{i=1}^N \frac{|\hat{y}_i - y_i|}{|y_i|}

    Args:
      unit: ``"%"`` to have it shown in per cent.
      ignore: as for :func:`mean_absolute_error`.
      name: the metric's name.

    Returns:
      The metric, lower being better. Output and label have the same shape, ``[batch, ...]``. An
      element whose label is 0 has no relative error and does not count.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import relative_error
      >>> metric = relative_error()
      >>> output, label = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 4.0, 6.0])
      >>> counted = jnp.ones(3, bool)
      >>> statistics = metric.statistics(output, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.333
    """

    def share(output: Array, label: Array) -> Array:
        return jnp.abs(output - label) / jnp.where(label == 0, jnp.nan, jnp.abs(label))

    return Metric(
        name=name,
        higher_is_better=False,
        unit=unit,
        statistics=_elements(name, share, ignore, without_zero=True),
        compute=lambda sums: _quotient(sums["total"], sums["number"]),
    )


def relative_l2(
    *, unit: str = "", ignore: float | None = None, name: str = "relative L2 error"
) -> Metric:
    r"""The length of the error as a share of that of the labels.

    .. math:: \sqrt{\frac{\sum_i (\hat{y}_i - y_i)^2}{\sum_i y_i^2}}

    It is what the field reports of a field that solves a differential equation: 1 for an output of
    0 everywhere. Labels of 0 count like others, unlike in :func:`relative_error`.

    Args:
      unit: ``"%"`` to have it shown in per cent.
      ignore: as for :func:`mean_absolute_error`.
      name: the metric's name.

    Returns:
      The metric, lower being better. Output and label have the same shape, ``[batch, ...]``; the
      sums are over all elements of the split. It is NaN if all labels are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import relative_l2
      >>> metric, counted = relative_l2(), jnp.array([True, True])
      >>> output, label = jnp.array([3.0, 1.0]), jnp.array([3.0, 4.0])
      >>> metric.over([(metric.statistics(output, label, counted), counted)])
      0.6
    """

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        output, label = _same_shape(name, output, label)
        valid = _valid(label, counted, ignore)
        squares = {"error": (output - label) ** 2, "label": label**2}
        return {key: _sums(square, valid)["total"] for key, square in squares.items()}

    return Metric(
        name=name,
        higher_is_better=False,
        unit=unit,
        statistics=statistics,
        compute=lambda sums: math.sqrt(_quotient(sums["error"], sums["label"])),
    )


def r2(*, name: str = "R2") -> Metric:
    r"""The coefficient of determination: the share of the labels' variance that is explained.

    .. math:: R^2 = 1 - \frac{\sum_i (\hat{y}_i - y_i)^2}{\sum_i (y_i - \bar{y})^2}

    Args:
      name: the metric's name.

    Returns:
      The metric. Output and label have the same shape, ``[batch, ...]``; with further axes it is
      the mean of each output's. NaN if the labels of an output are all the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import r2
      >>> metric = r2()
      >>> output, label = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 2.0, 3.0])
      >>> counted = jnp.ones(3, bool)
      >>> statistics = metric.statistics(output, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      0.5
    """

    def compute(found: dict[str, np.ndarray]) -> float:
        from sklearn.metrics import r2_score

        number = len(found["label"])
        if not number or not np.isfinite(found["output"]).all():
            return math.nan
        label, output = (
            found[key].reshape(number, -1).astype(np.float64) for key in ("label", "output")
        )
        if (np.ptp(label, axis=0) == 0).any():
            return math.nan
        return float(r2_score(label, output))

    return Metric(name=name, statistics=_pairs(name), compute=compute, gather=True)


def correlation(
    kind: Literal["pearson", "spearman"] = "pearson", *, name: str | None = None
) -> Metric:
    r"""The correlation of the outputs with the labels.

    .. math:: \frac{\sum_i (\hat y_i - \bar{\hat y}) (y_i - \bar y)}{\sqrt{
       \sum_i (\hat y_i - \bar{\hat y})^2 \sum_i (y_i - \bar y)^2}}

    Args:
      kind: ``"pearson"`` for the linear one, ``"spearman"`` for that of the ranks.
      name: the metric's name; ``"Pearson correlation"`` and the like by default.

    Returns:
      The metric, from -1 to 1. Output and label have the same shape, ``[batch, ...]``, and are
      taken as one series. NaN if one of them is constant.

    Raises:
      ValueError: if ``kind`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import correlation
      >>> metric = correlation("spearman")
      >>> output, label = jnp.array([1.0, 2.0, 9.0]), jnp.array([3.0, 5.0, 6.0])
      >>> counted = jnp.ones(3, bool)
      >>> statistics = metric.statistics(output, label, counted)
      >>> round(metric.over([(statistics, counted)]), 3)
      1.0
    """
    check_option(kind, ("pearson", "spearman"), "`kind` of correlation")
    name = name or f"{kind.capitalize()} correlation"

    def compute(found: dict[str, np.ndarray]) -> float:
        from scipy import stats

        x, y = (found[key].ravel().astype(np.float64) for key in ("output", "label"))
        if not np.isfinite(x).all() or x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of series that are nearly constant
            found_ = stats.pearsonr(x, y) if kind == "pearson" else stats.spearmanr(x, y)
        return float(found_[0])  # pyright: ignore[reportArgumentType]

    return Metric(name=name, statistics=_pairs(name), compute=compute, gather=True)


def mean_of(
    function: Callable[[PyTree, PyTree], Array],
    name: str,
    *,
    higher_is_better: bool = True,
    unit: str = "",
) -> Metric:
    """The mean of any score of an example.

    Args:
      function: ``function(output, label) -> score``, ``[batch]`` or with further axes, traced by
        JAX.
      name: the metric's name.
      higher_is_better: whether a larger score is a better one.
      unit: as of :class:`Metric`.

    Returns:
      The metric: the mean over all elements of the scores of the examples that count.

    Example:
      The angle between two directions, which the network returns as vectors of length 1:

      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import mean_of
      >>> def angle(output, label):
      ...     return jnp.degrees(jnp.arccos(jnp.clip(jnp.sum(output * label, axis=-1), -1, 1)))
      >>> metric = mean_of(angle, "angle", higher_is_better=False, unit="degrees")
      >>> x, y, counted = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), jnp.array([True])
      >>> metric.over([(metric.statistics(x, y, counted), counted)])
      90.0
    """

    def statistics(output: PyTree, label: PyTree, counted: Array) -> dict[str, Array]:
        scores = function(output, label)
        if scores.shape[:1] != counted.shape:
            raise ValueError(
                f"The metric {name!r}: the function must return a score for each of the "
                f"{counted.shape[0]} examples; got the shape {scores.shape}."
            )
        return _sums(scores, _like(counted, scores))

    return Metric(
        name=name,
        higher_is_better=higher_is_better,
        unit=unit,
        statistics=statistics,
        compute=lambda sums: _quotient(sums["total"], sums["number"]),
    )


# Parts of them


def _like(counted: Array, values: Array) -> Array:
    """Which examples count, for every element of the values."""
    return jnp.broadcast_to(counted.reshape(-1, *(1,) * (values.ndim - 1)), values.shape)


def _valid(label: Array, counted: Array, ignore: float | None) -> Array:
    """Which elements of the label count."""
    valid = _like(counted, label)
    if ignore is None:
        return valid
    if not jnp.issubdtype(label.dtype, jnp.floating):
        label = label.astype(jnp.int32)  # a byte cannot be compared with -1
    return valid & ~(jnp.isnan(label) if math.isnan(ignore) else label == ignore)


def _classes(name: str, output: Array, label: Array) -> Array:
    """The most likely class: of logits along the last axis, or of one logit for each element."""
    if output.shape == label.shape:
        return (output > 0).astype(jnp.int32)
    if output.shape[:-1] == label.shape and output.shape[-1] > 1:
        return output.argmax(axis=-1)
    raise ValueError(
        f"{name}: the output must have the label's shape, {label.shape}, or one more axis, of at "
        f"least two classes; got {output.shape}."
    )


def _elements(
    name: str,
    function: Callable[[Array, Array], Array],
    ignore: float | None,
    without_zero: bool = False,
) -> Statistics:
    """The sum of a function of output and label over the elements that count, and their number."""

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        output, label = _same_shape(name, output, label)
        valid = _valid(label, counted, ignore)
        if without_zero:
            valid &= label != 0
        return _sums(function(output, label), valid)

    return statistics


def _sums(values: Array, valid: Array) -> dict[str, Array]:
    values = values.astype(at_least_float32(values.dtype))
    return {"total": jnp.sum(jnp.where(valid, values, 0)), "number": jnp.sum(valid)}


def _pairs(name: str) -> Statistics:
    """The outputs and the labels themselves."""

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        output, label = _same_shape(name, output, label)
        return {"output": output, "label": label}

    return statistics


def _same_shape(name: str, output: Array, label: Array) -> tuple[Array, Array]:
    """Output and label in float32 at least."""
    if output.shape != label.shape:
        raise ValueError(
            f"{name}: output and label must have the same shape; got {output.shape} and "
            f"{label.shape}."
        )
    dtype = at_least_float32(output.dtype, label.dtype)
    return output.astype(dtype), label.astype(dtype)


def _of_scores(
    name: str, ignore: float | None, function: Callable[[np.ndarray, np.ndarray], float]
) -> Metric:
    """A metric of a binary label and a score: NaN without a positive, and of scores with NaN."""

    def statistics(output: Array, label: Array, counted: Array) -> dict[str, Array]:
        if output.shape == (*label.shape, 2):
            output = output[..., 1] - output[..., 0]
        if output.shape != label.shape:
            raise ValueError(
                f"{name}: a label is yes (1) or no (0), and the output a score, or the logits of "
                f"these two classes; got an output of shape {output.shape} for labels of shape "
                f"{label.shape}."
            )
        output, label = _same_shape(name, output, label)
        return {"score": output, "label": label, "valid": _valid(label, counted, ignore)}

    def compute(found: dict[str, np.ndarray]) -> float:
        label, score = _flat(found, "label", "score")
        if not label.any() or not np.isfinite(score).all():
            return math.nan
        return function(label.astype(int), score)

    return Metric(name=name, unit="%", statistics=statistics, compute=compute, gather=True)


def _flat(found: dict[str, np.ndarray], *keys: str) -> list[np.ndarray]:
    """The elements that count, along one axis."""
    return [found[key][found["valid"]] for key in keys]


def _rows(tree: PyTree, counted: np.ndarray) -> PyTree:
    """The examples that count."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[counted], tree)


def _quotient(total: Any, number: Any) -> float:
    """The quotient, NaN of nothing."""
    return float(total) / float(number) if number else math.nan


def _spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The type, the start and the end of each span of a sequence of tags."""
    spans, kind, start = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        continues = tag.startswith("I-") and tag[2:] == kind
        if kind and not continues:
            spans.add((kind, start, place))
        if not continues:
            kind, start = tag[2:], place  # no kind for "O"
    return spans
