"""``mtl-jax new``: a problem that runs as it is, and on data of one's own where it says CHANGE."""

import importlib
import pathlib
import re
import subprocess
import sys
from unittest.mock import Mock

import jax
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mtl_jax.__main__ import main
from mtl_jax.compare import compare, load_problem

ROOT = pathlib.Path(__file__).parents[1]
CHANGE = "# CHANGE: the rest of this function, into "
TABLE = '    # CHANGE: the rest of this function, into return pd.read_csv("homes.csv", sep=",")\n'
TEXT = '    #   return pd.read_csv("reviews.tsv", sep="\\t", names=["text", "topic", "stars"])\n'
IMAGES = """    #   table = pd.read_csv(FOLDER / "labels.csv")
    #   table["image"] = [read_image(file) for file in table["file"]]
    #   return table
"""
NAMES = """    #   table = pd.DataFrame({"file": [path.name for path in FOLDER.glob("*.png")]})
    #   names = table["file"].str.removesuffix(".png").str.split("_")
    #   table["color"], table["area"] = names.str[1], names.str[2].astype(float)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("my_problem", "my_table", "my_images", "my_text"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("inputs", ["table", "images", "text"])
def test_it_runs_as_it_is(inputs, folder, capsys):
    name = f"my_{inputs}"
    main(["new", name, "--inputs", inputs])
    assert f"mtl-jax compare {name}:problem --seeds 5" in capsys.readouterr().out
    path = folder / f"{name}.py"
    assert len(path.read_text().splitlines()) < 165
    for words in (["check", "--ignore", "D102"], ["format", "--check"]):
        config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", name + ".py"]
        ruff = subprocess.run([sys.executable, "-m", "ruff", *words, *config], capture_output=True)
        assert ruff.returncode == 0, ruff.stdout.decode()

    problem = load_problem(f"{name}:problem")
    assert sum(problem.size(split) for split in ("train", "validation", "test")) == 1000
    assert [len(task.metrics) for task in problem.tasks.values()] == [1, 1]
    # A tenth of one task's labels is missing, and is not counted.
    known = problem.labelled({field: np.asarray(problem.train[field]) for field in problem.train})
    assert sorted(round(float(np.mean(k)), 1) for k in known.values()) == [0.9, 1.0]
    results = compare(problem.with_settings(epochs=8), ["adaptive"], seeds=[0], alone=False)
    (run,) = (run for run in results.runs if run.weighting == "equal")
    a_class, number = run.metrics["test"].values()
    assert a_class["accuracy"][-1] > 0.8
    labels = np.asarray(problem.test[list(problem.tasks)[1]])
    assert number["absolute error"][-1] < 0.7 * np.nanmean(np.abs(labels - np.nanmedian(labels)))


def test_a_table_of_ones_own(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "id": np.arange(400)})
    table["word"] = rng.choice(["up", "down"], 400)
    table["price"] = 1000 + 300 * x[:, 0] * (table["word"] == "up") + 50 * x[:, 1]
    table["heating"] = np.where(x[:, 1] > 0, 7, 3)  # classes may be numbers
    table.loc[::7, "a"] = None  # missing inputs and missing labels
    table.loc[::5, "price"] = None
    table.to_csv("homes.csv", index=False)
    main(["new", "my_problem"])
    text = (folder / "my_problem.py").read_text()
    assert TABLE in text
    (folder / "my_problem.py").write_text(text.replace(TABLE, TABLE.replace(CHANGE, "")))
    problem = load_problem("my_problem:problem")
    assert problem.train["inputs"].shape == (280, 4)  # a, b, word_down, word_up
    np.testing.assert_allclose(problem.train["inputs"].mean(0), 0, atol=0.1)
    splits = [problem.train, problem.validation, problem.test]
    price = np.concatenate([split["price"] for split in splits])
    np.testing.assert_allclose(np.nanmean(price), table["price"].mean(), rtol=1e-5)
    assert np.isnan(price).sum() == 80
    params, model_state = problem.init(jax.random.key(0))
    batch = {field: values[:50] for field, values in problem.train.items()}
    losses, _ = problem.losses(params, model_state, jax.random.key(0), batch)
    # The loss of the examples whose price is known, in units of the standard deviation.
    known = ~np.isnan(batch["price"])
    predicted = problem.predict(params, model_state, batch)["price"]
    error = (np.asarray(predicted)[known] - batch["price"][known]) / np.nanstd(
        problem.train["price"]
    )
    np.testing.assert_allclose(losses["price"], np.mean(error**2), rtol=1e-4)


def test_pictures_of_ones_own(folder):
    """Two tasks that are classes, of files of any size."""
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        mode, size = [("RGB", (40, 30)), ("L", (20, 50))][i % 2]
        picture = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
        picture.save(folder / "pictures" / f"{i}.png")
        rows.append({"file": f"{i}.png", "color": mode, "area": ["small", "large"][i % 3 == 0]})
    pd.DataFrame(rows).to_csv(folder / "pictures" / "labels.csv", index=False)
    main(["new", "my_problem", "--inputs", "images"])
    text = (folder / "my_problem.py").read_text()
    assert IMAGES in text
    text = text.replace(IMAGES, IMAGES.replace("#   ", ""))
    numbers = 'NUMBERS = {"area": mean_absolute_error(unit="pixels")}'
    assert numbers in text
    text = text.replace(numbers, 'NUMBERS = {}\nCLASSES["area"] = accuracy()')
    (folder / "my_problem.py").write_text(text)
    problem = load_problem("my_problem:problem").with_settings(epochs=1, batch_size=16)
    assert problem.train["inputs"].shape == (42, 32, 32, 3)
    assert problem.train["inputs"].dtype == np.uint8
    results = compare(problem, [], seeds=[0], alone=False)
    assert set(results.runs[0].metrics["test"]) == {"color", "area"}


def test_pictures_of_all_kinds_are_seen_as_they_are(folder):
    """With transparency, with 16 bits, turned by a camera, and with a palette."""
    (folder / "pictures").mkdir()
    drawing = np.zeros((32, 32, 4), np.uint8)  # black on nothing
    drawing[8:24, 8:24, 3] = 255
    Image.fromarray(drawing).save(folder / "pictures" / "drawing.png")
    Image.fromarray(np.full((32, 32), 30000, np.uint16)).save(folder / "pictures" / "deep.png")
    lit = np.zeros((32, 32, 3), np.uint8)
    lit[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(lit).save(folder / "pictures" / "turned.png", exif=exif)
    Image.fromarray(lit).convert("P").save(folder / "pictures" / "palette.png")
    main(["new", "my_images", "--inputs", "images"])
    sys.path.insert(0, str(folder))
    read = importlib.import_module("my_images").read_image
    expected = np.repeat(255 - drawing[..., 3:], 3, axis=-1)
    np.testing.assert_array_equal(read("drawing.png"), expected)
    assert (read("deep.png") == 30000 // 256).all()
    np.testing.assert_array_equal(read("turned.png"), np.rot90(lit, -1))
    np.testing.assert_array_equal(read("palette.png"), lit)


def test_labels_in_the_names_of_the_files(folder):
    (folder / "pictures").mkdir()
    for number in range(30):
        name = f"{number}_{['red', 'green'][number % 2]}_{10 * number}.png"
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / "pictures" / name)
    main(["new", "my_problem", "--inputs", "images"])
    text = (folder / "my_problem.py").read_text()
    assert NAMES in text
    lines = NAMES.replace("#   ", "") + "".join(IMAGES.replace("#   ", "").splitlines(True)[1:])
    (folder / "my_problem.py").write_text(text.replace(NAMES, lines))
    problem = load_problem("my_problem:problem")
    for split in (problem.train, problem.validation, problem.test):
        number = split["inputs"][:, 0, 0, 0]
        np.testing.assert_array_equal(split["area"], 10.0 * number)
        np.testing.assert_array_equal(split["color"], (number % 2 == 0).astype(int))  # green: 0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"area": [1.0] * 20, "price": [1.0] * 20}, "['id', 'area', 'price'], but not ['heating']"),
        (
            {"area": [1.0] * 20, "heating": ["a"] * 20, "price": ["n.a."] * 19 + ["-"]},
            "'price' has words; should it be one of",
        ),
        ({"heating": ["a"] * 20, "price": [1.0] * 20}, "has no column that is an input"),
        (
            {"heating": ["a"] * 20, "price": [1.0] * 20, "id": None},
            "['heating', 'price'], but not ['id']",
        ),
        (
            {"name": [f"n{i}" for i in range(99)], "heating": ["a"] * 99, "price": [1.0] * 99},
            "The column 'name' has 99 words: put it into LEFT_OUT?",
        ),
    ],
)
def test_a_table_that_does_not_fit_is_said_plainly(table, message, folder, capsys):
    table = {"id": range(len(table["price"]))} | table
    columns = {name: values for name, values in table.items() if values is not None}
    pd.DataFrame(columns).to_csv("homes.csv", index=False)
    main(["new", "my_problem"])
    text = (folder / "my_problem.py").read_text()
    (folder / "my_problem.py").write_text(text.replace(TABLE, TABLE.replace(CHANGE, "")))
    with pytest.raises(SystemExit):
        main(["compare", "my_problem:problem"])
    printed = capsys.readouterr().err
    assert message in printed
    assert re.search(r"\(in my_problem.py, line \d+\)$", printed.strip())


def test_texts_of_ones_own(folder):
    texts = ["Good, good page!", "a Bad screen", "", "good " * 100] * 10
    texts = [text.replace("Bad", f"bad{i}") for i, text in enumerate(texts)]
    rows = [f"{text}\t{['book', 'film', ''][i % 3]}\t{i % 5}" for i, text in enumerate(texts)]
    (folder / "reviews.tsv").write_text("\n".join(rows))
    main(["new", "my_problem", "--inputs", "text"])
    text = (folder / "my_problem.py").read_text()
    assert TEXT in text
    (folder / "my_problem.py").write_text(text.replace(TEXT, TEXT.replace("#   ", "")))
    problem = load_problem("my_problem:problem")
    assert (problem.train["inputs"] == 1).any()  # a word that is in one text only
    x = np.concatenate(
        [problem.train["inputs"], problem.validation["inputs"], problem.test["inputs"]]
    )
    assert x.shape == (40, 64)
    assert sorted((x > 0).sum(1)) == [0] * 10 + [3] * 10 + [5] * 10 + [64] * 10
    params, model_state = problem.init(jax.random.key(0))
    found = problem.predict(params, model_state, problem.test)
    assert found["topic"].shape == (6, 2)
    assert all(np.isfinite(values).all() for values in found.values())


def test_texts_that_come_twice_are_kept_together(folder):
    """By the line that the file offers."""
    texts = [f"word{i % 20} word{i % 20}" for i in range(60)]
    rows = [f"{text}\t{['book', 'film'][i % 2]}\t{i % 5}" for i, text in enumerate(texts)]
    (folder / "reviews.tsv").write_text("\n".join(rows))
    main(["new", "my_text", "--inputs", "text"])
    text = (folder / "my_text.py").read_text().replace(TEXT, TEXT.replace("#   ", ""))
    offered, instead = '    #   groups = pd.factorize(table["text"])[0]\n', "np.arange(len(table))"
    assert offered in text
    (folder / "my_text.py").write_text(text.replace(instead, 'pd.factorize(table["text"])[0]'))
    problem = load_problem("my_text:problem")
    splits = [problem.train, problem.validation, problem.test]
    assert [len(split["stars"]) for split in splits] == [42, 9, 9]  # 14, 3 and 3 texts
    known = set(problem.train["inputs"][:, 0])
    assert len(known) == 14
    # Words that the training texts do not have are all the same: none of theirs.
    assert all(set(split["inputs"][:, 0]) == {1} for split in splits[1:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-problem", "must be one that Python can import"),
        ("class", "must be one that Python can import"),
        ("json", "'json' is the name of an installed module"),
        ("__main__", "'__main__' is the name of an installed module"),
        ("there", "there.py exists already"),
    ],
)
def test_a_name_that_cannot_be(name, message, folder, capsys):
    (folder / "there.py").write_text("kept = True\n")
    with pytest.raises(SystemExit) as error:
        main(["new", name])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"there.py"}
    assert (folder / "there.py").read_text() == "kept = True\n"


def test_a_folder_that_cannot_be_written(monkeypatch, capsys):
    monkeypatch.setattr(pathlib.Path, "open", Mock(side_effect=PermissionError("it is read-only")))
    with pytest.raises(SystemExit) as error:
        main(["new", "my_problem"])
    assert error.value.code == 1
    assert "error: it is read-only" in capsys.readouterr().err
