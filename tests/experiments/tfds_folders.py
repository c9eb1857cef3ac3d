"""Tiny data sets in the folders of tensorflow-datasets, written without TensorFlow."""

import io

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

STORIES = [
    ("Oil Prices Soar (AP)", "AP - Oil rose, AP found.", "AP"),
    ("Stocks End Up (Reuters)", "Reuters - Stocks rose\\on Friday.", "Reuters"),
    ("Vote Nears (AFP)", "AFP - Voters #39; mood.", "AFP"),
    ("Cadet Wins", " NEW YORK (Reuters) - A cadet won, reuters.com said.", "Reuters"),
    ("Piracy Curbed", "By ALEX VEIGA    LOS ANGELES (AP) -- Reports show.", "AP"),
    ("Rebels killed", "BANDA ACEH, Aug 24 (AFP): Seven killed.", "AFP"),
    ("Peace Voted (Canadian Press)", "Canadian Press - ADDIS ABABA (AP) - A vote.", "AP"),
    ("Comet Seen (SPACE.com)", "SPACE.com - A comet.", None),
    ("Aetna buys", "Aetna agreed to buy, the Associated Press said.", None),
    ("A plain title", "WASHINGTON - A plain story about AFP.", None),
]
"""Titles and descriptions as AG News has them, and the agency that they name."""


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


def write_stories(data_dir, copies):
    """Write AG News with each story once in the test split and so many times in the other."""
    features = tfds.features.FeaturesDict(
        {
            "title": tfds.features.Text(),
            "description": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
    )
    examples = [
        {"title": title, "description": description, "label": i % 4}
        for i, (title, description, _) in enumerate(STORIES)
    ]
    splits = {"train": examples * copies, "test": examples}
    return write(data_dir, "ag_news_subset", "1.0.0", features, splits)
