import builtins
import collections
import csv
import gzip
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.metrics import roc_auc_score

import mtl_jax
from experiments.problems import build_problem
from experiments.problems.tox21 import (
    ASSAYS,
    binary_cross_entropy,
    featurize,
    random_split,
    read_table,
    scaffold_split,
    tox21,
)

RINGS = ("c1ccccc1", "c1ccncc1", "C1CCCCC1", "C1CCNCC1", "c1ccoc1", "c1ccsc1", "c1cc[nH]c1")
TAILS = ("", "C", "CC", "CCC", "O", "CO", "CCO", "N", "CN", "CCN", "Cl", "ClCC", "Br", "F", "S")
UNREADABLE = ("C[Al](C)(C)(C)(C)(C)C(C)(C)(C)C", "c1ccccc")


def molecules():
    """Rings with tails, chains, and two that RDKit refuses."""
    chains = ["C" * number + end for number in range(1, 9) for end in ("O", "N", "S", "Cl")]
    known = list(dict.fromkeys([tail + ring for ring in RINGS for tail in TAILS] + chains))
    order = np.random.default_rng(0).permutation(len(known))
    shuffled = [known[number] for number in order]
    return [*shuffled[:5], UNREADABLE[0], *shuffled[5:], UNREADABLE[1]]


def table():
    """A table as MoleculeNet's: a label is whether a letter occurs, where it is not missing."""
    rng = np.random.default_rng(1)
    rows = []
    for number, smiles in enumerate(molecules()):
        labels = [smiles.count(letter) % 2 for letter in ("N", "O", "c", "C", "S", "1") * 2]
        cells = ["" if rng.random() < 0.2 else str(label) for label in labels]
        rows.append([*cells, f"TOX{number}", smiles])
    text = io.StringIO()
    csv.writer(text).writerows([[*ASSAYS, "mol_id", "smiles"], *rows])
    return text.getvalue(), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tox21")
    (folder / "tox21.csv").write_text(table()[0])
    return folder


@pytest.fixture(scope="module")
def problem(folder):
    return build_problem("tox21", str(folder))


def splits_of(problem):
    return (problem.train, problem.validation, problem.test)


@pytest.mark.parametrize("split", ["scaffold", "random"])
def test_fingerprints_and_labels_are_those_of_the_table(folder, split, capfd):
    """As a multiset over the splits; what RDKit refuses is left out, silently."""
    from rdkit import Chem
    from rdkit.Chem import rdFingerprintGenerator

    problem = tox21(str(folder), split=split)
    assert capfd.readouterr() == ("", "")
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2)
    expected = collections.Counter()
    for row in table()[1]:
        if row[-1] not in UNREADABLE:
            found = generator.GetSparseCountFingerprint(Chem.MolFromSmiles(row[-1]))
            bits = frozenset(key % 2048 for key in found.GetNonzeroElements())
            labels = tuple(-1 if cell == "" else int(cell) for cell in row[:12])
            expected[bits, labels] += 1
    found = collections.Counter()
    for fields in splits_of(problem):
        assert fields["fingerprint"].dtype == np.uint8
        assert fields["fingerprint"].shape[1] == 2048
        assert all(fields[assay].dtype == np.int8 for assay in ASSAYS)
        for number, row in enumerate(fields["fingerprint"]):
            labels = tuple(int(fields[assay][number]) for assay in ASSAYS)
            found[frozenset(np.flatnonzero(row).tolist()), labels] += 1
    assert found == expected
    assert "2 molecules that RDKit refuses are left out" in problem.description
    sizes = [problem.size(part) for part in ("train", "validation", "test")]
    assert sum(sizes) == len(molecules()) - 2


def test_gzipped_table_gives_the_same_data(problem, tmp_path):
    (tmp_path / "tox21.csv.gz").write_bytes(gzip.compress(table()[0].encode()))
    assert tox21(str(tmp_path)).digest() == problem.digest()


def test_scaffolds_are_rings_and_their_links():
    smiles = ["CCc1ccccc1", "oops", "CCO", "OC(Cc1ccccc1)C1CCC1", "C[C@H](N)O"]
    known, _, scaffolds = featurize(smiles)
    assert known == [0, 2, 3, 4]
    assert scaffolds == ["c1ccccc1", "", "c1ccc(CCC2CCC2)cc1", ""]


def test_scaffold_split_by_hand():
    """Ten molecules: 4 + 2 fill the training split up to 8, with one more pair, the last one."""
    scaffolds = ["a", "b", "a", "c", "a", "d", "a", "b", "c", "e"]
    split = scaffold_split(scaffolds)
    assert {part: rows.tolist() for part, rows in split.items()} == {
        "train": [0, 1, 2, 3, 4, 6, 7, 8],
        "validation": [9],
        "test": [5],
    }


def test_scaffold_split_fills_up_with_smaller_groups_and_keeps_each_together():
    scaffolds = ["a"] * 7 + ["b"] * 2 + ["c"]
    split = scaffold_split(scaffolds)
    assert split["train"].tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert split["validation"].tolist() == [7, 8]
    assert split["test"].tolist() == []

    drawn = np.random.default_rng(0).zipf(1.3, 2000) % 500
    split = scaffold_split([str(scaffold) for scaffold in drawn])
    rows = np.concatenate(list(split.values()))
    assert sorted(rows) == list(range(2000))
    groups = [set(drawn[rows]) for rows in split.values()]
    assert sum(map(len, groups)) == len(set(drawn))
    assert 1590 <= len(split["train"]) <= 1600
    assert 190 <= len(split["validation"]) <= 210
    sizes = collections.Counter(drawn.tolist())
    assert max(sizes[scaffold] for scaffold in groups[2]) <= 20 < max(sizes.values())


def test_random_split_is_a_partition_and_always_the_same():
    split = random_split(7823)
    assert [len(rows) for rows in split.values()] == [6258, 782, 783]
    assert sorted(np.concatenate(list(split.values()))) == list(range(7823))
    for part, rows in random_split(7823).items():
        np.testing.assert_array_equal(rows, split[part])


def test_losses_and_metrics_are_over_the_labels_that_are_there(problem):
    """Against the definition in NumPy and float64; the encoder without dropout."""
    params, _ = jax.jit(problem.init)(jax.random.key(0))
    batch = {field: values[:40] for field, values in problem.train.items()}
    logits = jax.jit(problem.predict)(params, {}, batch)
    labelled, loss_of = problem.labelled(batch), jax.jit(binary_cross_entropy)
    for assay in ASSAYS:
        there = batch[assay] >= 0
        assert 0 < there.sum() < 40
        np.testing.assert_array_equal(labelled[assay], there)
        z, y = np.asarray(logits[assay], np.float64)[there], batch[assay][there]
        p = 1 / (1 + np.exp(-z))
        expected = -np.mean(np.where(y == 1, np.log(p), np.log(1 - p)))
        loss = loss_of(logits[assay], batch[assay])
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    task = problem.tasks["NR-AR"]
    found = task.metrics[0].statistics(logits["NR-AR"], batch["NR-AR"], labelled["NR-AR"])
    there = batch["NR-AR"] >= 0
    expected = roc_auc_score(batch["NR-AR"][there], np.asarray(logits["NR-AR"])[there])
    assert task.metrics[0].over([(found, labelled["NR-AR"])]) == pytest.approx(expected)


def test_no_labels_no_loss_and_no_gradient():
    missing = jnp.full(3, -1, jnp.int8)
    loss, gradient = jax.value_and_grad(binary_cross_entropy)(jnp.array([1.0, -2.0, 0.0]), missing)
    assert loss == 0
    np.testing.assert_array_equal(gradient, 0)


def test_problem_trains(problem):
    """The parts keep their contract, dropout is in training alone, and steps lower the losses."""
    params, state = jax.jit(problem.init)(jax.random.key(0))
    batch = {field: jnp.asarray(values[:96]) for field, values in problem.train.items()}
    encode = jax.jit(problem.encoder)
    z, _ = encode(params, state, jax.random.key(1), batch)
    again, _ = encode(params, state, jax.random.key(1), batch)
    other, _ = encode(params, state, jax.random.key(2), batch)
    np.testing.assert_array_equal(z, again)
    assert (z != other).any()
    mtl_jax.check_heads(problem.heads, params, z, batch, tasks=list(ASSAYS))
    paths = {"encoder": True, "heads": False}
    assert {path: problem.shared(f"{path}/kernel") for path in params} == paths

    optimizer = optax.adam(3e-3)

    def step(carry, key):
        params, moments = carry

        def total(params):
            losses, _ = problem.losses(params, state, key, batch)
            return sum(losses.values()), losses

        gradient, losses = jax.grad(total, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), losses

    keys = jax.random.split(jax.random.key(3), 40)
    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))
    _, history = scan((params, optimizer.init(params)))
    for assay, losses in history.items():
        assert losses[-1] < 0.8 * losses[0], assay


def test_what_is_missing_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="No folder was given.*--data-dir.*molecules"):
        tox21()
    with pytest.raises(FileNotFoundError, match=f"There is none in {tmp_path}: download"):
        build_problem("tox21", str(tmp_path))
    with pytest.raises(ValueError, match="`split` of tox21"):
        tox21(str(folder), split="stratified")
    (tmp_path / "tox21.csv").write_text(table()[0].replace("SR-MMP", "SR-MPP"))
    with pytest.raises(ValueError, match=r"tox21.csv is not MoleculeNet's.*no column 'SR-MMP'"):
        tox21(str(tmp_path))
    smiles = read_table(str(folder))[0]
    (tmp_path / "tox21.csv").write_text(table()[0] + "," * table()[0].splitlines()[0].count(","))
    assert read_table(str(tmp_path))[0] == smiles
    (tmp_path / "tox21.csv").write_text(re.sub(r"(?m)^(0|1)(\.0)?,", "2,", table()[0], count=1))
    with pytest.raises(ValueError, match=r"tox21.csv: a label is 0, 1 or empty"):
        tox21(str(tmp_path))
    imported = builtins.__import__

    def without_rdkit(name, *args, **kwargs):
        if name.startswith("rdkit"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_rdkit)
    with pytest.raises(ValueError, match=r"RDKit, which is not installed.*\.\[molecules\]"):
        tox21(str(folder))
