import io
import sys

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.io
from PIL import Image

import mtl_jax
from experiments.networks import unet
from experiments.problems import build_problem
from experiments.problems.nyuv2 import FlipAndEnlarge, crop, enlarged, every_tenth_run, main

HEIGHT, WIDTH = 16, 32
NUMBERS = np.concatenate([np.arange(1, 31, 2), [31, 32]])
"""Sixteen runs of consecutive numbers, of one photograph each and the last of two."""


def write_folder(folder, rng, height=HEIGHT, width=WIDTH):
    """A folder of the documented form: a bright square is class 1, and nearer than the rest."""
    number = len(NUMBERS) + 4
    rows, columns = rng.integers(2, height - 8, number), rng.integers(4, width - 12, number)
    square = np.zeros((number, height, width), bool)
    for i in range(number):
        square[i, rows[i] : rows[i] + 6, columns[i] : columns[i] + 8] = True
    image = np.where(square[..., None], 220, 40).astype(np.uint8).repeat(3, axis=-1)
    seg13 = np.where(square, 1, 12).astype(np.uint8)
    seg13[:, :, 0] = 0
    jpeg = []
    for picture in image:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95, subsampling=0)
        jpeg.append(buffer.getvalue())
    fields = {
        "jpeg": np.frombuffer(b"".join(jpeg), np.uint8),
        "offsets": np.cumsum([0, *map(len, jpeg)]),
        "seg13": seg13,
        "seg40": (3 * seg13).astype(np.uint8),
        "depth_cm": np.where(square, 150, 420).astype(np.uint16),
        "split": np.array([0] * len(NUMBERS) + [1] * 4, np.uint8),
        "index1": np.concatenate([NUMBERS, np.arange(33, 37)]).astype(np.int16),
    }
    np.savez(folder / f"nyuv2_{height}x{width}.npz", **fields, something_else=np.zeros(3))
    return fields | {"image": image}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nyuv2")
    return folder, write_folder(folder, np.random.default_rng(0))


@pytest.fixture(scope="module")
def problem(folder):
    return build_problem("nyuv2_40", str(folder[0]))


def test_splits_and_fields(problem, folder):
    """Photographs with a held-out number of run are in validation, and fields belong together."""
    written = folder[1]
    rows = {
        "train": [*range(4), *range(5, 14), 15, 16],
        "validation": [4, 14],
        "test": range(17, 21),
    }
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[2:15, 2:30] = True  # 1.5 to 15.67 of 16 and 2 to 30 of 32
    for split, own in rows.items():
        found, own = getattr(problem, split), list(own)
        np.testing.assert_array_equal(found["segmentation"], written["seg13"][own])
        np.testing.assert_array_equal(found["segmentation40"], written["seg40"][own])
        expected = np.where(inside, written["depth_cm"][own] / 100, 0)
        np.testing.assert_allclose(found["depth"], expected, rtol=1e-6)
        difference = found["image"].astype(int) - written["image"][own]
        assert np.abs(difference).mean() < 4  # JPEG loses a little


def test_runs_of_consecutive_numbers_stay_together():
    numbers = np.array([3, 4, 5, 9, 10, 12, 20, 22, 23, 24, 30, 40, 50, 60, 70, 80, 90, 100, 101])
    held_out = every_tenth_run(numbers)
    # Runs: 3-5, 9-10, 12, 20, 22-24, 30, 40, 50, 60, 70, 80, ...; the fifth one, then the 15th.
    assert numbers[held_out].tolist() == [22, 23, 24]
    assert np.flatnonzero(every_tenth_run(np.arange(1, 41, 2))).tolist() == [4, 14]


def test_crop_is_the_usual_one():
    for size, expected in {
        (480, 640): (45, 470, 40, 600),
        (96, 128): (9, 94, 8, 120),
        (288, 384): (27, 282, 24, 360),
    }.items():
        rows, columns = crop(*size)
        assert (rows.start, rows.stop, columns.start, columns.stop) == expected


def definition(field, values, corner, part, scale, flip):
    """An enlarged field in float64, pixel by pixel."""
    height, width = values.shape[:2]
    found = np.empty(values.shape, np.float64)
    for i in range(height):
        for j in range(width):
            # The centre of the new pixel, in pixels of the part.
            y, x = (i + 0.5) * part[0] / height, (j + 0.5) * part[1] / width
            if field != "image":
                found[i, j] = values[corner[0] + int(y), corner[1] + int(x)]
                continue
            total = 0.0
            for dy in (0, 1):
                for dx in (0, 1):
                    row, column = int(np.floor(y - 0.5)) + dy, int(np.floor(x - 0.5)) + dx
                    weight = (1 - abs(y - 0.5 - row)) * (1 - abs(x - 0.5 - column))
                    row = corner[0] + np.clip(row, 0, part[0] - 1)
                    column = corner[1] + np.clip(column, 0, part[1] - 1)
                    total = total + weight * values[row, column].astype(np.float64)
            found[i, j] = total
    if field == "depth":
        found /= scale
    return found[:, ::-1] if flip else found


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1.2, 1.5])
def test_enlarging(scale, flip):
    rng = np.random.default_rng(0)
    example = {
        "image": rng.integers(0, 256, (24, 30, 3), np.uint8),
        "segmentation": rng.integers(0, 14, (24, 30), np.uint8),
        "depth": rng.uniform(0, 9, (24, 30)).astype(np.float32),
    }
    part = [int(24 / scale), int(30 / scale)]
    corner = [24 - part[0], (30 - part[1]) // 2]
    for field, values in example.items():
        found = enlarged(field, values, corner, part, scale, flip)
        expected = definition(field, values, corner, part, scale, flip)
        assert found.dtype == values.dtype
        tolerance = {"rtol": 1e-6, "atol": 1.01 if field == "image" else 0}
        np.testing.assert_allclose(found.astype(np.float64), expected, **tolerance)


def test_what_is_drawn():
    """All fields are changed alike; scales, corners and flips are drawn evenly."""
    rows, columns = np.mgrid[0:48, 0:48].astype(np.float32)
    example = {"rows": rows, "columns": columns, "image": np.zeros((48, 48, 3), np.uint8)}
    transformation, rng = FlipAndEnlarge(), np.random.default_rng(0)
    sizes, flips, corners = [], [], []
    for _ in range(600):
        found = transformation.random_map(example, rng)
        sizes.append(int(np.ptp(found["rows"])) + 1)
        assert np.ptp(found["columns"]) + 1 == sizes[-1]
        flips.append(found["columns"][0, 0] > found["columns"][0, -1])
        corners.append((found["rows"].min(), found["columns"].min()))
    assert set(sizes) == {48, 40, 32}
    shares = [np.mean(np.array(sizes) == size) for size in (48, 40, 32)]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.06)
    assert 0.44 < np.mean(flips) < 0.56
    smallest = np.array(corners)[np.array(sizes) == 32]
    np.testing.assert_allclose(smallest.mean(axis=0), 8, atol=1.2)
    assert smallest.min() == 0
    assert smallest.max() == 16


def test_maps_are_enlarged_as_by_jax():
    @jax.jit
    def enlarge(x):
        found = unet.enlarged(x, 4, "bilinear"), unet.enlarged(x, 2, "nearest")
        expected = jax.image.resize(x, (2, 12, 20, 4), "bilinear")
        return *found, expected, jax.image.resize(x, (2, 6, 10, 4), "nearest")

    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    bilinear, nearest, expected_bilinear, expected_nearest = enlarge(x)
    np.testing.assert_allclose(bilinear, expected_bilinear, atol=1e-6)
    np.testing.assert_array_equal(nearest, expected_nearest)


def test_losses_metrics_and_a_few_steps(problem):
    key = jax.random.key(0)
    params, model_state = jax.jit(problem.init)(key)
    assert model_state == {}
    batch = {field: values[:8] for field, values in problem.train.items()}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        def total(params):
            losses, _ = problem.losses(params, model_state, key, batch)
            return sum(losses.values()), losses

        gradient, losses = jax.grad(total, has_aux=True)(params)
        outputs = problem.predict(params, model_state, batch)
        statistics = {
            name: [
                metric.statistics(outputs[name], jnp.asarray(batch[name]), jnp.full(8, True))
                for metric in task.metrics
            ]
            for name, task in problem.tasks.items()
        }
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), losses, outputs, statistics

    state = optimizer.init(params)
    carry, first, outputs, _ = step(params, state)
    check_losses(first, outputs, batch)
    for _ in range(20):
        carry, losses, outputs, statistics = step(*carry)
    for task in problem.tasks:
        assert losses[task] < 0.7 * first[task], task
    check_metrics(problem, outputs, statistics, batch)


def check_losses(losses, outputs, batch):
    assert set(losses) == set(outputs) == {"segmentation", "depth", "segmentation40"}
    for task in ("segmentation", "segmentation40"):
        logits, label = np.asarray(outputs[task], np.float64), np.asarray(batch[task])
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = np.take_along_axis(log_p, label[..., None].astype(int), axis=-1)[..., 0]
        np.testing.assert_allclose(losses[task], -chosen[label != 0].mean(), rtol=1e-5)
    error = np.abs(np.asarray(outputs["depth"], np.float64) - batch["depth"])
    np.testing.assert_allclose(losses["depth"], error[:, 2:15, 2:30].mean(), rtol=1e-5)


def check_metrics(problem, outputs, statistics, batch):
    """What the metrics make of predictions and labels, against NumPy."""
    found = {
        (name, metric.name): metric.over([(own, np.full(8, True))])
        for name, task in problem.tasks.items()
        for metric, own in zip(task.metrics, statistics[name], strict=True)
    }
    depth, label = (
        np.asarray(x, np.float64)[:, 2:15, 2:30] for x in (outputs["depth"], batch["depth"])
    )
    error = np.abs(depth - label)
    answer, label13 = np.argmax(outputs["segmentation"], axis=-1), np.asarray(batch["segmentation"])
    valid = label13 != 0
    overlaps = []
    for c in range(1, 14):
        union = np.sum(valid & ((answer == c) | (label13 == c)))
        if union:
            overlaps.append(np.sum(valid & (answer == c) & (label13 == c)) / union)
    expected = {
        ("segmentation", "mIoU"): np.mean(overlaps),
        ("segmentation", "pixel accuracy"): np.mean((answer == label13)[valid]),
        ("depth", "absolute error"): error.mean(),
        ("depth", "relative error"): (error / label).mean(),
        ("depth", "RMSE"): np.sqrt((error**2).mean()),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    assert set(found) - set(expected) == {
        ("segmentation40", "mIoU"),
        ("segmentation40", "pixel accuracy"),
    }


def test_each_task_reads_its_own_copy(problem):
    params, model_state = jax.jit(problem.init)(jax.random.key(0))
    batch = {field: values[:2] for field, values in problem.train.items()}
    z, _ = jax.jit(problem.encoder)(params, model_state, jax.random.key(0), batch)
    assert z.shape == (2, HEIGHT // 4, WIDTH // 4, 32)
    mtl_jax.check_heads(problem.heads, params, z, batch, tasks=list(problem.tasks))


def test_two_tasks_by_default(folder):
    problem = build_problem("nyuv2", str(folder[0]))
    assert list(problem.tasks) == ["segmentation", "depth"]
    assert set(problem.train) == {"image", "segmentation", "depth"}
    assert len(problem.transformations) == 1


def test_missing_or_wrong_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="(?s)--data-dir.*python -m experiments.problems.nyuv2"
    ):
        build_problem("nyuv2")
    with pytest.raises(FileNotFoundError, match=f"none in {tmp_path}"):
        build_problem("nyuv2", str(tmp_path))
    np.savez(tmp_path / "nyuv2_16x16.npz", jpeg=np.zeros(3))
    with pytest.raises(ValueError, match="lacks.*'offsets'"):
        build_problem("nyuv2", str(tmp_path))
    np.savez(tmp_path / "nyuv2_32x32.npz", jpeg=np.zeros(3))
    with pytest.raises(ValueError, match="one size"):
        build_problem("nyuv2", str(tmp_path))


# The program


def write_authors_files(folder, rng):
    """Four photographs of 40 x 60 pixels as the authors and others give them away."""
    images = rng.integers(0, 256, (4, 3, 60, 40), np.uint8)
    depths = rng.uniform(1, 9, (4, 60, 40)).astype(np.float32)
    labels = rng.integers(0, 895, (4, 60, 40)).astype(np.uint16)
    with h5py.File(folder / "labeled.mat", "w") as file:
        for name, values in {"images": images, "depths": depths, "labels": labels}.items():
            file[name] = values
    splits = {"trainNdxs": np.array([[1], [4]]), "testNdxs": np.array([[2], [3]])}
    scipy.io.savemat(folder / "splits.mat", splits)
    to_40, to_13 = rng.integers(1, 41, 894), rng.integers(1, 14, 40)
    scipy.io.savemat(folder / "map40.mat", {"mapClass": to_40[None].astype(np.uint8)})
    scipy.io.savemat(folder / "map13.mat", {"classMapping13": {"labels13": to_13[None]}})
    return images, depths, labels, to_40, to_13


def arguments(folder, **others):
    files = {"mat": "labeled.mat", "splits": "splits.mat"}
    files |= {"mapping40": "map40.mat", "mapping13": "map13.mat", "out": "out"}
    options = {name: folder / file for name, file in files.items()}
    options |= {"height": 16, "width": 32} | others
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def area_means(values, height, width):
    """The mean of the pixels whose centres lie in each new pixel."""
    rows, columns = (
        np.ceil((np.arange(size) + 0.5) * new / size).astype(int) - 1
        for size, new in zip(values.shape[:2], (height, width), strict=True)
    )
    found = np.zeros((height, width, *values.shape[2:]))
    for i in range(height):
        for j in range(width):
            block = values[rows == i][:, columns == j].astype(np.float64)
            found[i, j] = block.mean(axis=(0, 1))
    return found


def test_the_program_makes_the_folder_that_is_read(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images, depths, labels, to_40, to_13 = write_authors_files(tmp_path, rng)
    main(arguments(tmp_path))
    path = tmp_path / "out" / "nyuv2_16x32.npz"
    assert capsys.readouterr().out.split() == [str(path)]
    found = np.load(path)
    assert found["split"].tolist() == [0, 1, 1, 0]
    assert found["index1"].tolist() == [1, 2, 3, 4]
    for number in range(4):
        label, depth = labels[number].T, depths[number].T
        for i in range(16):
            for j in range(32):
                own = label[int((i + 0.5) * 2.5), int((j + 0.5) * 1.875)]
                seg40 = to_40[own - 1] if own else 0
                assert found["seg40"][number, i, j] == seg40
                assert found["seg13"][number, i, j] == (to_13[seg40 - 1] if seg40 else 0)
        np.testing.assert_allclose(
            found["depth_cm"][number], 100 * area_means(depth, 16, 32), atol=0.51
        )
        begin, end = found["offsets"][number : number + 2]
        image = np.asarray(Image.open(io.BytesIO(found["jpeg"][begin:end].tobytes())))
        expected = area_means(images[number].transpose(2, 1, 0), 16, 32)
        assert np.abs(image - expected).mean() < 8  # JPEG loses much of noise
        assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.9
    folder = {field: found[field] for field in found.files}
    assert folder["jpeg"].dtype == np.uint8


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"height": 20}, "multiples of 16, got 20 x 32"),
        ({"mapping13": "map40.mat"}, "must hold classMapping13"),
        ({"splits": "none.mat"}, "none.mat"),
        ({"mat": "none.mat"}, "none.mat"),
        ({"splits": "raw.mat"}, "raw.mat is no MATLAB file of version 5"),
        ({"splits": "text.mat"}, "text.mat is no MATLAB file of version 5"),
        ({"mat": "text.mat"}, "text.mat is no MATLAB file of version 7.3"),
    ],
)
def test_the_program_says_what_is_wrong(tmp_path, capsys, others, message):
    write_authors_files(tmp_path, np.random.default_rng(0))
    (tmp_path / "text.mat").write_text("no numbers")
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (tmp_path / "raw.mat").write_bytes(header.ljust(512, b"\0"))
    others = {k: tmp_path / v if isinstance(v, str) else v for k, v in others.items()}
    with pytest.raises(SystemExit) as stopped:
        main(arguments(tmp_path, **others))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_h5py_is_needed_only_by_the_program(tmp_path, capsys, monkeypatch):
    write_authors_files(tmp_path, np.random.default_rng(0))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(SystemExit):
        main(arguments(tmp_path))
    assert "pip install -e '.[prepare]'" in capsys.readouterr().err
