"""Data sets of tensorflow-datasets, read without TensorFlow from where they are prepared."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import absl.logging
import numpy as np

from mtl_jax.compare.data import Split


def prepared_examples(name: str, data_dir: str | None) -> dict[str, list[dict[str, Any]]]:
    """The examples of each split of a data set.

    Args:
      name: as of :func:`prepared_sources`.
      data_dir: as of :func:`prepared_sources`.

    Returns:
      For each split its examples, decoded.

    Raises:
      FileNotFoundError: as :func:`prepared_sources`.
    """
    return {split: list(source) for split, source in prepared_sources(name, data_dir).items()}


def prepared_sources(name: str, data_dir: str | None) -> dict[str, Sequence[dict[str, Any]]]:
    """The splits of a data set, whose examples are read and decoded when they are asked for.

    A data set that is not prepared is downloaded and prepared, which takes TensorFlow.

    Args:
      name: the data set's name in tensorflow-datasets.
      data_dir: the folder that holds prepared data sets; ``None`` for tensorflow-datasets'
        default.

    Returns:
      For each split its examples by number.

    Raises:
      FileNotFoundError: if the data set is not prepared and TensorFlow is not installed.
      ValueError: if it is prepared in another format than ArrayRecord, which is read by number.
    """
    import tensorflow_datasets as tfds

    # tensorflow-datasets warns of a missing OpenCV and of each folder that it finds empty.
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        try:
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        except ValueError as error:
            if "File format is already set" not in str(error):
                raise
            where = "tensorflow-datasets' default folder" if data_dir is None else data_dir
            raise ValueError(
                f"The data set {name!r} is prepared in {where} in another format than ArrayRecord. "
                f"Prepare it in another folder, to be given with --data-dir:\n"
                f"{_to_prepare(name, 'FOLDER')}"
            ) from error
        if not builder.is_prepared():
            if importlib.util.find_spec("tensorflow") is None:
                raise FileNotFoundError(_how_to_prepare(name, data_dir, builder.data_path))
            builder.download_and_prepare()
        sources: Any = builder.as_data_source()
        return dict(sources)
    finally:
        absl.logging.set_verbosity(verbosity)


def _how_to_prepare(name: str, data_dir: str | None, path: Any) -> str:
    return (
        f"The data set {name!r} is not prepared: there is none in {path}. If it is prepared "
        "elsewhere, give the folder that holds it with --data-dir. To download and prepare it:\n"
        f"{_to_prepare(name, data_dir)}"
    )


def _to_prepare(name: str, data_dir: str | None) -> str:
    # Not `tfds build`, which also imports Apache Beam.
    option = "" if data_dir is None else f", data_dir={data_dir!r}"
    build = f"tfds.builder({name!r}{option}, file_format='array_record').download_and_prepare()"
    return (
        "  pip install -e '.[prepare]'\n"
        f'  python -c "import tensorflow_datasets as tfds; {build}"'
    )


def hold_out(fields: Split, share: float = 0.1) -> tuple[dict[str, np.ndarray], ...]:
    """Cut a validation split off the training data, the same one at every call.

    Args:
      fields: the training data.
      share: the share of the examples that is held out, one at least.

    Returns:
      The training and the validation split.
    """
    number = len(next(iter(fields.values())))
    order = np.random.default_rng(0).permutation(number)
    bound = max(1, round(share * number))
    return _take(fields, order[bound:]), _take(fields, order[:bound])


def _take(fields: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {field: values[rows] for field, values in fields.items()}
