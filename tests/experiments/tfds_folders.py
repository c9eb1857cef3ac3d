"""Tiny data sets in the folders of tensorflow-datasets, written without TensorFlow."""

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
