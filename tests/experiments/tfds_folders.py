"""Tiny data sets in the folders of tensorflow-datasets, written without TensorFlow."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds


def write(data_dir, name, version, features, splits):
    """Write the examples of each split as tensorflow-datasets prepares them."""
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name,
        version=tfds.core.Version(version),
        data_dir=str(folder),
        module_name="tests",
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features, description="A tiny data set.", disable_shuffling=True
    )
    writer = tfds.core.SequentialWriter(
        info, 1000, overwrite=True, file_format=tfds.core.FileFormat.ARRAY_RECORD
    )
    writer.initialize_splits(list(splits))
    writer.add_examples(splits)
    writer.close_all()
    return data_dir


def write_cifar(data_dir, name, labels, num_train, num_test):
    """Write CIFAR with pictures of one colour; ``labels`` are the number of classes of each label.

    A picture's colour tells its index (:func:`picture`), and so do its labels, the index modulo the
    number of classes.
    """
    features = {label: tfds.features.ClassLabel(num_classes=n) for label, n in labels.items()}
    features |= {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3))}
    examples = [
        {"id": f"picture {index}", "image": _png(picture(index))}
        | {label: index % number for label, number in labels.items()}
        for index in range(num_train + num_test)
    ]
    splits = {"train": examples[:num_train], "test": examples[num_train:]}
    return write(data_dir, name, "3.0.2", tfds.features.FeaturesDict(features), splits)


def picture(index):
    return np.full((32, 32, 3), (index, 2 * index, 255 - index), np.uint8)


def _png(array):
    """A picture as a file: to encode arrays is TensorFlow's part."""
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "png")
    file.seek(0)
    return file
