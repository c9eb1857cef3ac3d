"""NYU Depth v2: what is seen in every pixel of a photograph of a room, and how far away it is.

The problem reads a folder with one file, ``nyuv2_<height>x<width>.npz``. It has these fields of N
photographs, in the order of their official numbers:

======== ========================= ===========================================================
jpeg     uint8, all bytes          the photographs as JPEG, one after the other
offsets  int64, N + 1              where the bytes of each begin, and where the last ones end
seg13    uint8, N x height x width the class of each pixel, 1 to 13; 0 is unlabelled
seg40    uint8, N x height x width the class of each pixel, 1 to 40; 0 is unlabelled
depth_cm uint16, like seg13        the depth of each pixel in centimetres
split    uint8, N                  0 for the official training set (795), 1 for the test set (654)
index1   int, N                    the official number, from 1
======== ========================= ===========================================================

Whatever else is in the file is not read. This program makes the folder, at any size, from four
files to be downloaded::

    python -m experiments.problems.nyuv2 --mat nyu_depth_v2_labeled.mat --splits splits.mat
        --mapping40 classMapping40.mat --mapping13 class13Mapping.mat --out DIR

``nyu_depth_v2_labeled.mat`` (2.8 GB) and ``splits.mat`` are the authors', from
https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html and
https://cs.nyu.edu/~silberman/projects/indoor_scene_seg_sup.html. ``classMapping40.mat``, from the
labels to the 40 classes of Gupta et al., and ``class13Mapping.mat``, from these to the 13 classes
of Couprie et al., are in https://github.com/ankurhanda/nyuv2-meta-data.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree
from PIL import Image

from experiments.networks.unet import MapHead, UNet
from experiments.problems.classification import adam_cosine
from experiments.problems.pictures import scaled
from mtl_jax._masking import masked_mean
from mtl_jax.compare.data import Batch
from mtl_jax.compare.metrics import (
    accuracy,
    mean_absolute_error,
    mean_iou,
    relative_error,
    root_mean_squared_error,
)
from mtl_jax.compare.problem import Problem, Task

FIELDS = ("jpeg", "offsets", "seg13", "seg40", "depth_cm", "split", "index1")
"""What is read of a folder's file."""

SCALES = (1.0, 1.2, 1.5)
"""How much a training photograph is enlarged."""

CHANNELS = (32, 64, 128)
"""The channels of the network's levels."""

MULTIPLE = 2 * 2 ** len(CHANNELS)
"""What the network needs the height and the width to be multiples of."""

CLASSES = {"segmentation": 14, "segmentation40": 41}
"""The classes of each segmentation, that of unlabelled pixels among them."""

MIDDLE = 3.0
"""The depth in metres at which an untrained network begins: about the mean of rooms."""


def nyuv2(data_dir: str | None = None, *, classes40: bool = False) -> Problem:
    r"""Build segmentation and depth of the labelled photographs of NYU Depth v2.

    Segmentation in 13 classes has the cross entropy of the labelled pixels, depth the mean absolute
    error in metres:

    .. math:: L_{seg} = -\frac{1}{|V|} \sum_{i \in V} \log p_{i, c_i}, \qquad
              L_{depth} = \frac{1}{|D|} \sum_{i \in D} |\hat{d}_i - d_i|

    Both are means over all pixels of a batch that count: V are those with a class, D those within
    the usual crop, outside which the depth is filled in from nothing and counts as missing. The
    white frame of the photographs stays; its pixels have no class and no depth.

    Of the 795 training photographs those are held out for validation that are in every tenth run of
    consecutive numbers. Neighbours in number show the same room; the official split parts rooms, so
    that a run of training photographs begins and ends with a room, and no room is in both.

    Training photographs are flipped and enlarged at random as in later work with MTAN: a part
    smaller by 1, 1.2 or 1.5 is brought to full size, and its depth divided by as much.

    The network is a U-Net at a quarter of the height and width, whose last map all tasks share;
    each has two convolutions on top, and its prediction is enlarged bilinearly.

    Published results (13 classes, depth and surface normals; MTAN on SegNet at 288 x 384; Navon et
    al., 2022) are comparable in kind only:

    ============ ======= ================ ================ ================
    weighting    mIoU, % pixel accuracy, % absolute error, m relative error
    ============ ======= ================ ================ ================
    each alone   38.30   63.76            0.6754           0.2780
    equal        39.29   65.33            0.5493           0.2263
    dwa          39.11   65.31            0.5510           0.2285
    uncertainty  36.87   63.17            0.5446           0.2260
    nash_mtl     40.13   65.93            0.5261           0.2171
    ============ ======= ================ ================ ================

    Args:
      data_dir: the folder that holds the file ``nyuv2_<height>x<width>.npz``; the module says what
        is in it, and how to make it.
      classes40: whether segmentation in 40 classes is a third task.

    Returns:
      The problem, with the tasks ``segmentation``, ``depth`` and, if asked for,
      ``segmentation40``.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if there are several, or the file is not of this form.

    References:
      Silberman et al., *Indoor Segmentation and Support Inference from RGBD Images*, ECCV 2012

      Couprie et al., `Indoor Semantic Segmentation using Depth Information
      <https://arxiv.org/abs/1301.3572>`_, 2013

      Gupta et al., *Perceptual Organization and Recognition of Indoor Scenes from RGB-D Images*,
      CVPR 2013

      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, 2019; enlarging as in
      https://github.com/lorenmt/mtan/issues/34

      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, 2022
    """
    splits = nyuv2_splits(data_dir)
    if not classes40:
        for fields in splits.values():
            del fields["segmentation40"]
    tasks = {
        "segmentation": _segmentation("segmentation"),
        "depth": Task(
            [
                mean_absolute_error(unit="m", ignore=0),
                relative_error(ignore=0),
                root_mean_squared_error(unit="m", ignore=0),
            ]
        ),
    }
    if classes40:
        tasks["segmentation40"] = _segmentation("segmentation40")
    encoder = UNet(CHANNELS)
    heads = {
        task: MapHead(CLASSES[task])
        if task in CLASSES
        else MapHead(1, bias_init=nn.initializers.constant(MIDDLE))
        for task in tasks
    }

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, *keys = jax.random.split(key, 1 + len(heads))
        z, variables = encoder.init_with_output(
            encoder_key, scaled({"image": splits["train"]["image"][:1]})
        )
        head_params = {
            task: head.init(head_key, z)["params"]
            for (task, head), head_key in zip(heads.items(), keys, strict=True)
        }
        return {"encoder": variables["params"], "heads": head_params}, {}

    def encode(
        params: PyTree, model_state: PyTree, key: Array | None, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        return encoder.apply({"params": params["encoder"]}, scaled(batch)), model_state

    def outputs_of(params: PyTree, zs: Mapping[str, PyTree]) -> dict[str, Array]:
        outputs: dict[str, Any] = {
            task: head.apply({"params": params["heads"][task]}, zs[task])
            for task, head in heads.items()
        }
        return outputs | {"depth": outputs["depth"][..., 0]}

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        outputs = outputs_of(params, zs)
        return {
            task: (_cross_entropy if task in CLASSES else _absolute_error)(output, batch[task])
            for task, output in outputs.items()
        }

    def predict(params: PyTree, model_state: PyTree, batch: Batch) -> dict[str, Array]:
        z, _ = encode(params, model_state, None, batch)
        return outputs_of(params, dict.fromkeys(tasks, z))

    return Problem(
        name="nyuv2_40" if classes40 else "nyuv2",
        description="A photograph of a room: what is in every pixel, and how far away is it?",
        tasks=tasks,
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        init=init,
        encoder=encode,
        heads=losses_of,
        shared=lambda path: path.startswith("encoder/"),
        predict=predict,
        transformations=[FlipAndEnlarge()],
        optimizer=adam_cosine,
        learning_rate=1e-3,
        epochs=20,
        batch_size=8,
    )


def nyuv2_40(data_dir: str | None = None) -> Problem:
    """Build :func:`nyuv2` with segmentation in 40 classes as a third task.

    Args:
      data_dir: as of :func:`nyuv2`.

    Returns:
      The problem.
    """
    return nyuv2(data_dir, classes40=True)


def _segmentation(task: str) -> Task:
    return Task([mean_iou(CLASSES[task], ignore=0), accuracy(ignore=0, name="pixel accuracy")])


def _cross_entropy(logits: Float[Array, "batch height width classes"], labels: Array) -> Array:
    """The mean over the pixels that are labelled."""
    labels = labels.astype(jnp.int32)
    values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return masked_mean(values, labels != 0)


def _absolute_error(depth: Float[Array, "batch height width"], labels: Array) -> Array:
    """The mean over the pixels whose depth is known."""
    return masked_mean(jnp.abs(depth - labels), labels != 0)


class FlipAndEnlarge(grain.transforms.RandomMap):
    """Enlarge a part of a photograph to its full size, and turn half of them over."""

    def random_map(self, element: Mapping[str, np.ndarray], rng: np.random.Generator) -> Any:
        """Change one example."""
        scale = SCALES[rng.integers(len(SCALES))]
        size = element["image"].shape[:2]
        part = [int(length / scale) for length in size]
        corner = [
            int(rng.integers(length - own + 1)) for length, own in zip(size, part, strict=True)
        ]
        flip = rng.random() < 0.5
        return {
            field: enlarged(field, values, corner, part, scale, flip)
            for field, values in element.items()
        }


def enlarged(
    field: str,
    values: np.ndarray,
    corner: list[int],
    part: list[int],
    scale: float,
    flip: bool,
) -> np.ndarray:
    """A part of a field of an example at full size.

    Args:
      field: the field: ``image`` is interpolated bilinearly, all else takes the nearest pixel.
      values: the field's values.
      corner: the row and the column of the part's upper left pixel.
      part: the part's height and width.
      scale: by how much it is enlarged; a depth is divided by it.
      flip: whether it is turned over, left to right.

    Returns:
      The values, in the shape and the dtype that they have.
    """
    (top, left), (height, width), size = corner, part, values.shape[:2]
    if field == "image":
        own = Image.fromarray(values[top : top + height, left : left + width])
        values = np.asarray(own.resize(size[::-1], Image.Resampling.BILINEAR))
    else:
        rows, columns = nearest(height, size[0]), nearest(width, size[1])
        values = values[(top + rows)[:, None], left + columns]
        if field == "depth":
            values = values / np.float32(scale)
    return np.ascontiguousarray(values[:, ::-1]) if flip else values


def nearest(size: int, new_size: int) -> np.ndarray:
    """For each of so many pixels along an axis the one of the old axis that its centre lies in."""
    return ((2 * np.arange(new_size) + 1) * size) // (2 * new_size)


# The folder


def nyuv2_splits(data_dir: str | None) -> dict[str, dict[str, np.ndarray]]:
    """The photographs and labels of a folder.

    Args:
      data_dir: as of :func:`nyuv2`.

    Returns:
      For each split the fields ``image`` (uint8), ``segmentation`` and ``segmentation40`` (uint8, 0
      where unlabelled) and ``depth`` (float32, in metres, 0 where it does not count).

    Raises:
      FileNotFoundError: as :func:`nyuv2`.
      ValueError: as :func:`nyuv2`.
    """
    path = _only_file(data_dir)
    with np.load(path) as file:
        missing = [field for field in FIELDS if field not in file]
        if missing:
            raise ValueError(f"{path} must have the fields {FIELDS}; it lacks {missing}.")
        found = {field: file[field] for field in FIELDS}
    number, height, width = found["depth_cm"].shape
    check_size(height, width)
    ends = found["offsets"]
    image = np.empty((number, height, width, 3), np.uint8)
    for i in range(number):
        data = found["jpeg"][ends[i] : ends[i + 1]].tobytes()
        image[i] = np.asarray(Image.open(io.BytesIO(data)))
    rows, columns = crop(height, width)
    depth = np.zeros((number, height, width), np.float32)
    depth[:, rows, columns] = found["depth_cm"][:, rows, columns] / np.float32(100)
    fields = {
        "image": image,
        "segmentation": found["seg13"],
        "segmentation40": found["seg40"],
        "depth": depth,
    }
    train, test = np.flatnonzero(found["split"] == 0), np.flatnonzero(found["split"] == 1)
    held_out = every_tenth_run(found["index1"][train])
    chosen = {"train": train[~held_out], "validation": train[held_out], "test": test}
    return {
        split: {field: values[rows] for field, values in fields.items()}
        for split, rows in chosen.items()
    }


def _only_file(data_dir: str | None) -> Path:
    paths = [] if data_dir is None else sorted(Path(data_dir).glob("nyuv2_*x*.npz"))
    if not paths:
        where = "No folder is given" if data_dir is None else f"There is none in {data_dir}"
        raise FileNotFoundError(
            "NYU Depth v2 is read from the file nyuv2_<height>x<width>.npz of the folder that is "
            f"given with --data-dir. {where}. To make it of the authors' files:\n"
            "  pip install -e '.[experiments,prepare]'\n"
            "  python -m experiments.problems.nyuv2 --help"
        )
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"The folder {data_dir} must hold one size of NYU Depth v2; got {names}.")
    return paths[0]


def every_tenth_run(numbers: np.ndarray) -> np.ndarray:
    """Which of these numbers, which rise, are in every tenth run of consecutive ones."""
    numbers = numbers.astype(np.int64)
    run = np.cumsum(np.diff(numbers, prepend=numbers[0]) > 1)
    return run % 10 == 4


def crop(height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns whose depth counts: 45 to 470 and 40 to 600 of 480 x 640."""
    return (
        slice(-(-45 * height // 480), 470 * height // 480),
        slice(-(-40 * width // 640), 600 * width // 640),
    )


def check_size(height: int, width: int) -> None:
    """Raise a ``ValueError`` if the network cannot work on photographs of this size."""
    if min(height, width) < 1 or height % MULTIPLE or width % MULTIPLE:
        raise ValueError(
            f"The height and the width must be multiples of {MULTIPLE}, got {height} x {width}."
        )


# The program that makes the folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """Make the folder that NYU Depth v2 is read from.

    A pixel of a photograph, and its depth, is the mean of the old pixels whose centres lie in it;
    of labels the one in its middle is taken.
    """

    mat: Path
    """nyu_depth_v2_labeled.mat, from https://cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html"""
    splits: Path
    """splits.mat, from https://cs.nyu.edu/~silberman/projects/indoor_scene_seg_sup.html"""
    mapping40: Path
    """classMapping40.mat, from https://github.com/ankurhanda/nyuv2-meta-data"""
    mapping13: Path
    """class13Mapping.mat, from the same place"""
    out: Path
    """The folder, made if it is not there."""
    height: int = 96
    """The height of the photographs, a multiple of 16."""
    width: int = 128
    """The width of the photographs, a multiple of 16."""


def prepare(settings: Preparation) -> Path:
    """Make the folder.

    Args:
      settings: where from, where to, and the size.

    Returns:
      The file that is written.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: if the size does not fit the network, a file is not of the form that it is known
        by, or h5py is not installed.
    """
    check_size(settings.height, settings.width)
    to_40, to_13 = class_mappings(settings.mapping40, settings.mapping13)
    splits = _read_mat(settings.splits, "trainNdxs", "testNdxs")
    split_of = {
        int(number): value
        for value, key in enumerate(("trainNdxs", "testNdxs"))
        for number in splits[key].ravel()
    }
    jpeg, fields = [], {"seg13": [], "seg40": [], "depth_cm": []}
    for number, (image, depth, labels) in enumerate(_frames(settings.mat), 1):
        if number not in split_of:
            raise ValueError(f"{settings.splits} does not say which split photograph {number} has.")
        if labels.max() >= len(to_40):
            raise ValueError(
                f"{settings.mapping40} maps {len(to_40) - 1} labels; photograph {number} has the "
                f"label {labels.max()}."
            )
        size = (settings.width, settings.height)
        buffer = io.BytesIO()
        small = Image.fromarray(image).resize(size, Image.Resampling.BOX)
        small.save(buffer, "JPEG", quality=95, subsampling=0)
        jpeg.append(np.frombuffer(buffer.getvalue(), np.uint8))
        rows = nearest(labels.shape[0], settings.height)
        columns = nearest(labels.shape[1], settings.width)
        seg40 = to_40[labels[rows[:, None], columns]]
        depth = np.asarray(Image.fromarray(depth).resize(size, Image.Resampling.BOX))
        fields["seg40"].append(seg40)
        fields["seg13"].append(to_13[seg40])
        fields["depth_cm"].append(np.rint(100 * depth).astype(np.uint16))
    numbers = range(1, len(jpeg) + 1)
    found: dict[str, Any] = {
        "jpeg": np.concatenate(jpeg),
        "offsets": np.cumsum([0, *map(len, jpeg)]),
        "split": np.array([split_of[number] for number in numbers], np.uint8),
        "index1": np.array(numbers, np.int16),
    }
    found |= {field: np.stack(values) for field, values in fields.items()}
    settings.out.mkdir(parents=True, exist_ok=True)
    path = settings.out / f"nyuv2_{settings.height}x{settings.width}.npz"
    np.savez_compressed(path, **found)
    return path


def class_mappings(mapping40: Path, mapping13: Path) -> tuple[np.ndarray, np.ndarray]:
    """The class of 40 of each label, and the class of 13 of each of 40; 0 stays 0.

    Args:
      mapping40: the file ``classMapping40.mat``, whose ``mapClass`` has a class for each label from
        1 on.
      mapping13: the file ``class13Mapping.mat``, whose ``classMapping13.labels13`` has a class of
        13 for each class of 40 from 1 on.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: if it has another form.
    """
    to_40 = _read_mat(mapping40, "mapClass")["mapClass"]
    to_13 = _read_mat(mapping13, "classMapping13")["classMapping13"]
    if to_13.dtype.names is None or "labels13" not in to_13.dtype.names:
        raise ValueError(f"{mapping13}: classMapping13 must have the field labels13.")
    found = []
    for path, mapping, classes in (
        (mapping40, to_40, CLASSES["segmentation40"]),
        (mapping13, to_13["labels13"].flat[0], CLASSES["segmentation"]),
    ):
        mapping = np.concatenate([[0], np.ravel(mapping)]).astype(np.uint8)
        if mapping.max() >= classes:
            raise ValueError(f"{path} must map to 1 to {classes - 1}; got {mapping.max()}.")
        found.append(mapping)
    return found[0], found[1]


def _read_mat(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Variables of a MATLAB file of version 5."""
    import scipy.io

    with open(path, "rb") as file:
        try:
            found = scipy.io.loadmat(file)
        except (NotImplementedError, ValueError, scipy.io.matlab.MatReadError) as error:
            raise ValueError(f"{path} is no MATLAB file of version 5: {error}") from error
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} must hold {', '.join(names)}; it lacks {', '.join(missing)}.")
    return found


def _frames(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Photograph, depth in metres and labels, one after the other, height before width."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ValueError(
            "To read a MATLAB file of version 7.3, h5py is needed: pip install -e '.[prepare]'."
        ) from error
    if path.exists() and not h5py.is_hdf5(path):
        raise ValueError(f"{path} is no MATLAB file of version 7.3.")
    with h5py.File(path) as file:
        missing = [name for name in ("images", "depths", "labels") if name not in file]
        if missing:
            raise ValueError(f"{path} must hold images, depths and labels; it lacks {missing}.")
        arrays: Any = [file["images"], file["depths"], file["labels"]]
        for image, depth, labels in zip(*arrays, strict=True):
            # MATLAB's axes come in reverse: channels, width, height.
            yield image.T.copy(), depth.T.copy(), labels.T


def main(arguments: list[str] | None = None) -> None:
    """Make the folder from the command line; exits with status 2 if that cannot be done."""
    import tyro

    settings = tyro.cli(Preparation, prog="python -m experiments.problems.nyuv2", args=arguments)
    try:
        print(prepare(settings))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
