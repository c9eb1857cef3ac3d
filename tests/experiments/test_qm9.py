import csv
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets as tfds

import mtl_jax
from experiments.problems import build_problem
from experiments.problems.qm9 import (
    CHARGES,
    ENERGIES,
    TARGETS,
    coulomb_eigenvalues,
    qm9,
    qm9_all,
    read_molecules,
    split_rows,
)
from tests.experiments.tfds_folders import write

NUMBER = 120
SYMBOLS = {charge: symbol for symbol, charge in CHARGES.items()}
IN_MEV = {"homo", "lumo", "zpve", *ENERGIES}


def drawn_molecules():
    """Molecules of random atoms; their properties are in the data's units, hartree among them."""
    rng = np.random.default_rng(0)
    molecules = []
    for index in range(NUMBER):
        charges = rng.choice([1, 1, 6, 6, 7, 8], rng.integers(3, 9)).tolist()
        # Atoms no nearer than 0.7 angstrom, as in a molecule.
        positions = np.arange(len(charges))[:, None] * [1.0, 0.2, 0] + rng.uniform(-0.1, 0.1, 3)
        positions = np.round(positions + rng.uniform(-0.1, 0.1, positions.shape), 8)
        properties = {task: round(float(rng.normal()), 6) for task in TARGETS}
        of_atoms = sum(-0.5 * charge**2 for charge in charges)
        properties |= {task: of_atoms + 0.05 * properties[task] for task in ENERGIES}
        properties["mu"] = float(index)  # tells which molecule it is
        molecules.append((charges, positions, properties))
    return molecules


MOLECULES = drawn_molecules()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The files of qm9pack; to import it is an error, as it is with a recent setuptools."""
    root = tmp_path_factory.mktemp("packages")
    (root / "qm9pack" / "data").mkdir(parents=True)
    (root / "qm9pack" / "__init__.py").write_text("import pkg_resources_of_old\n")
    for part in (1, 2, 3):
        rows = MOLECULES[(part - 1) * NUMBER // 3 : part * NUMBER // 3]
        with open(root / "qm9pack" / "data" / f"qm9_part{part}.csv", "w", newline="") as file:
            columns = [target.column for target in TARGETS.values()]
            writer = csv.writer(file)
            writer.writerow(["SMILES", "N_atoms", "Elements", "XYZ_Ang", *columns])
            for charges, positions, properties in rows:
                elements = ",".join(f"'{SYMBOLS[charge]}'" for charge in charges)
                places = ",".join(f"[{x!r},{y!r},{z!r}]" for x, y, z in positions.tolist())
                lists = [f"[{elements}]", f"[{places}]"]
                writer.writerow(["?", len(charges), *lists, *map(properties.get, TARGETS)])
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    number = tfds.features.Tensor(shape=(), dtype=np.float32)
    features = {target.field: number for target in TARGETS.values()} | {
        "U0": number,
        "charges": tfds.features.Tensor(shape=(29,), dtype=np.int64),
        "positions": tfds.features.Tensor(shape=(29, 3), dtype=np.float32),
        "SMILES": tfds.features.Text(),
    }
    examples = []
    for charges, positions, properties in MOLECULES:
        padding = 29 - len(charges)
        example = {target.field: np.float32(properties[task]) for task, target in TARGETS.items()}
        for task in ENERGIES:
            energy = properties[task] - sum(-0.4 * charge**2 for charge in charges)
            example[TARGETS[task].field] = np.float32(energy)
        example |= {
            "U0": np.float32(properties["u0"]),
            "SMILES": "?",
            "charges": np.pad(charges, (0, padding)),
            "positions": np.pad(positions, ((0, padding), (0, 0))).astype(np.float32),
        }
        examples.append(example)
    folder = write(
        root / "written", "qm9", "1.0.0", tfds.features.FeaturesDict(features), {"train": examples}
    )
    (root / "qm9" / "original").mkdir(parents=True)
    shutil.move(folder / "qm9" / "1.0.0", root / "qm9" / "original")
    return root


@pytest.fixture
def installed(package, monkeypatch):
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "qm9pack", raising=False)


@pytest.fixture(scope="module")
def problem(prepared):
    return qm9(str(prepared), molecules=NUMBER)


def test_the_package_is_read_without_importing_it(installed):
    splits = read_molecules(None, NUMBER)
    assert [len(split.charges) for split in splits.values()] == [96, 12, 12]
    read = []
    for split in splits.values():
        for row, index in enumerate(split.targets["mu"].astype(int)):
            charges, positions, properties = MOLECULES[index]
            size = len(charges)
            assert split.charges[row].tolist() == charges + [0] * (29 - size)
            np.testing.assert_array_equal(split.positions[row, :size], positions)
            assert not split.positions[row, size:].any()
            for task, values in split.targets.items():
                factor = 27211.386246 if task in IN_MEV else 1
                np.testing.assert_allclose(values[row], factor * properties[task], rtol=1e-9)
            read.append(index)
    assert sorted(read) == list(range(NUMBER))


def test_both_sources_make_the_same_problem(installed, problem):
    """Energies of the free atoms are subtracted in one of them; that makes no difference."""
    other = qm9(molecules=NUMBER)
    for split in ("train", "validation", "test"):
        found, expected = getattr(other, split), getattr(problem, split)
        assert set(found) == {"features", *TARGETS}
        for field, values in found.items():
            np.testing.assert_allclose(values, expected[field], atol=2e-4, err_msg=field)


def test_splits():
    rows = split_rows(130_831, 20_000)
    assert [len(part) for part in rows.values()] == [16_000, 2_000, 2_000]
    chosen = np.concatenate(list(rows.values()))
    assert len(set(chosen.tolist())) == 20_000
    assert 60_000 < chosen.mean() < 70_000
    np.testing.assert_array_equal(split_rows(130_831, 20_000)["test"], rows["test"])
    everything = split_rows(130_831, None)
    assert [len(part) for part in everything.values()] == [110_000, 10_000, 10_831]
    assert len(set(np.concatenate(list(everything.values())).tolist())) == 130_831


def test_too_few_molecules(prepared):
    with pytest.raises(ValueError, match=r"there are 120: too few for `molecules`=20,000\."):
        build_problem("qm9", str(prepared))
    with pytest.raises(ValueError, match="there are 120: too few for all of them"):
        build_problem("experiments.problems.qm9:qm9_all", str(prepared))
    with pytest.raises(ValueError, match="`molecules`"):
        qm9(str(prepared), molecules=9)


def test_eigenvalues_against_the_definition():
    for charges, positions, _ in MOLECULES[:10]:
        size = len(charges)
        matrix = np.zeros((size, size))
        for i in range(size):
            for j in range(size):
                distance = np.sqrt(((positions[i] - positions[j]) ** 2).sum()) / 0.529177210903
                matrix[i, j] = (
                    charges[i] ** 2.4 / 2 if i == j else charges[i] * charges[j] / distance
                )
        expected = sorted(np.linalg.eigvals(matrix).real, key=abs, reverse=True)
        padded = np.pad(charges, (0, 29 - size)), np.pad(positions, ((0, 29 - size), (0, 0)))
        (found,) = coulomb_eigenvalues(padded[0][None], padded[1][None])
        np.testing.assert_allclose(found[:size], expected, rtol=1e-8)
        assert not found[size:].any()

        turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
        order = np.random.default_rng(2).permutation(size)
        moved = padded[1].copy()
        moved[:size] = positions[order] @ turn + 3
        charged = np.pad(np.array(charges)[order], (0, 29 - size))
        np.testing.assert_allclose(
            coulomb_eigenvalues(charged[None], moved[None])[0], found, atol=1e-9
        )


def test_fit_and_standardisation_are_of_the_training_molecules(prepared, problem):
    splits = read_molecules(str(prepared), NUMBER)
    counts = {
        name: np.array([[(row == c).sum() for c in (1, 6, 7, 8, 9)] for row in split.charges])
        for name, split in splits.items()
    }
    for task in TARGETS:
        values = {name: split.targets[task] for name, split in splits.items()}
        if task in ENERGIES:
            x = counts["train"][:, :4].astype(float)  # there is no fluorine
            fit = np.linalg.solve(x.T @ x, x.T @ values["train"])
            values = {name: values[name] - counts[name][:, :4] @ fit for name in values}
        mean, deviation = values["train"].mean(), values["train"].std()
        for name in values:
            np.testing.assert_allclose(
                getattr(problem, name)[task], (values[name] - mean) / deviation, atol=1e-4
            )
        # An error of one deviation, in the field's unit.
        (metric,) = problem.tasks[task].metrics
        counted = jnp.full(5, True)
        error = metric.over([(metric.statistics(jnp.ones(5), jnp.zeros(5), counted), counted)])
        np.testing.assert_allclose(error, deviation, rtol=1e-6)
        assert metric.unit == TARGETS[task].unit
        assert (metric.unit == "meV") == (task in IN_MEV)
    features = problem.train["features"]
    assert features.shape == (96, 34)
    varying = features.std(axis=0) > 0
    assert varying.sum() == 8 + 4  # molecules of at most 8 atoms, of 4 elements
    train = splits["train"]
    own = [  # molecule by molecule
        coulomb_eigenvalues(charges[None], positions[None])[0]
        for charges, positions in zip(train.charges, train.positions, strict=True)
    ]
    values = np.concatenate([own, counts["train"]], axis=1)
    expected = (values - values.mean(axis=0)) / np.where(varying, values.std(axis=0), 1)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(features[:, varying].std(axis=0), 1, rtol=1e-4)


def test_losses_and_training(problem):
    key = jax.random.key(0)
    params, model_state = jax.jit(problem.init)(key)
    batch = {field: jnp.asarray(values[:64]) for field, values in problem.train.items()}
    losses, _ = jax.jit(problem.losses)(params, model_state, key, batch)
    outputs = jax.jit(problem.predict)(params, model_state, batch)
    for task in TARGETS:
        assert outputs[task].shape == (64,)
        expected = ((np.float64(outputs[task]) - np.float64(batch[task])) ** 2).mean()
        np.testing.assert_allclose(losses[task], expected, rtol=1e-5)

    z, _ = problem.encoder(params, model_state, key, batch)
    mtl_jax.check_heads(problem.heads, params, z, batch, tasks=list(TARGETS))

    optimizer = optax.adam(problem.learning_rate)

    def total(params):
        losses, _ = problem.losses(params, model_state, key, batch)
        return sum(losses.values()), losses

    def step(carry, _):
        params, state = carry
        gradient, losses = jax.grad(total, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), losses

    carry = (params, optimizer.init(params))
    _, history = jax.jit(lambda carry: jax.lax.scan(step, carry, length=40))(carry)
    for task, values in history.items():
        assert values[-1] < 0.9 * values[0], task


def test_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        build_problem("qm9")
    for part in ("qm9pack", "'.[molecules]'", "--data-dir", "tensorflow-datasets"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError) as error:
        qm9_all(str(tmp_path))
    for part in (str(tmp_path / "qm9" / "original"), "'.[prepare]'", "'.[molecules]'"):
        assert part in str(error.value)
