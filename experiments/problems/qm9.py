"""QM9: eleven properties of small organic molecules, from their atoms and where these are."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from experiments.networks.dense import DenseEncoder
from experiments.networks.heads import Heads
from experiments.problems.classification import adam_cosine
from experiments.problems.prepared import prepared_sources
from mtl_jax._checks import read_integer
from mtl_jax.compare.data import Batch
from mtl_jax.compare.metrics import mean_absolute_error
from mtl_jax.compare.problem import Problem, Task

CHARGES = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
"""The elements that occur, and their atomic numbers."""
MAX_ATOMS = 29

HARTREE = 27_211.386_246
"""In meV."""
BOHR = 0.529_177_210_9
"""In angstrom."""


class Target(NamedTuple):
    """A property and where it stands."""

    unit: str
    """In which errors are reported."""
    factor: float
    """From the data's unit to this one."""
    column: str
    """Of qm9pack."""
    field: str
    """Of tensorflow-datasets."""


TARGETS = {
    "mu": Target("D", 1, "Dipole_debye", "mu"),
    "alpha": Target("a0^3", 1, "Polarizability_bohr3", "alpha"),
    "homo": Target("meV", HARTREE, "HOMO_au", "homo"),
    "lumo": Target("meV", HARTREE, "LUMO_au", "lumo"),
    "r2": Target("a0^2", 1, "R2_bohr2", "r2"),
    "zpve": Target("meV", HARTREE, "ZPVE_au", "zpve"),
    # tensorflow-datasets has numbers of 32 bits. Less the energies of the free atoms, which are
    # linear in the element counts and so make no difference here, they are exact to 0.01 meV.
    "u0": Target("meV", HARTREE, "InternalEnergy_0K_au", "U0_atomization"),
    "u298": Target("meV", HARTREE, "InternalEnergy_298K_au", "U_atomization"),
    "h298": Target("meV", HARTREE, "Enthalphy_298K_au", "H_atomization"),
    "g298": Target("meV", HARTREE, "GibbsFreeEnergy_298K_au", "G_atomization"),
    "cv": Target("cal/(mol K)", 1, "Heatcapacity_Cv_cal_mol_K", "Cv"),
}
"""The tasks: dipole moment, polarisability, the highest occupied and the lowest unoccupied orbital,
the electrons' spatial extent, zero-point vibrations, internal energy at 0 K and at 298.15 K,
enthalpy, free energy, heat capacity."""
ENERGIES = ("u0", "u298", "h298", "g298")
"""The tasks that a linear fit on the element counts explains for the most part."""


class Molecules(NamedTuple):
    """Some molecules: their atoms, padded with zeros at the end, and their properties."""

    charges: Int[np.ndarray, "molecules atoms"]
    positions: Float[np.ndarray, "molecules atoms 3"]
    """In angstrom."""
    targets: dict[str, Float[np.ndarray, "molecules"]]
    """In the units of :data:`TARGETS`."""


def qm9(data_dir: str | None = None, *, molecules: int | None = 20_000) -> Problem:
    """Build the eleven regressions of QM9 on light features of a molecule.

    The features are the eigenvalues of the Coulomb matrix (Rupp et al.), sorted by absolute value
    and padded with zeros to 29, and how many atoms of each element there are: 34 numbers, each
    standardised. A dense network of three layers reads them, and each task has a linear head.

    The tasks are those of Navon et al.: all properties but the gap, which is the difference of two
    others. The four energies are what a linear fit on the element counts leaves of them. Targets
    are standardised, and the loss is the mean squared error, as theirs. Fit, means and deviations
    are those of the training molecules. The metric is the mean absolute error in the field's units:
    D, a0^3, a0^2, meV and cal/(mol K), a0 being the Bohr radius.

    The 3,054 molecules whose structure is uncertain are left out, by both sources of the data,
    which leaves 130,831. A tenth of the molecules that are taken is held out for validation, and a
    tenth for the test; of all of them 110,000 train, 10,000 validate and the rest is the test, as
    in the literature. The splits are the same at every call.

    Delta-m in Navon et al., in % against tasks trained alone: equal weights 177.6, uncertainty
    108.0, Nash-MTL 62.0. That is a message-passing network on the graphs of 110,000 molecules, 300
    epochs, whose errors are several times smaller: comparable in kind at most.

    Args:
      data_dir: the folder where tensorflow-datasets has prepared ``qm9``; ``None`` for the data of
        the package qm9pack (the extra ``molecules``).
      molecules: take only so many, drawn at random; ``None`` for all, as :func:`qm9_all` does.

    Returns:
      The problem, with the tasks of :data:`TARGETS`.

    Raises:
      FileNotFoundError: if there are no data.
      ValueError: if there are fewer than so many molecules.

    References:
      Ramakrishnan et al., `Quantum chemistry structures and properties of 134 kilo molecules
      <https://doi.org/10.1038/sdata.2014.22>`_, 2014

      Rupp et al., `Fast and Accurate Modeling of Molecular Atomization Energies with Machine
      Learning <https://arxiv.org/abs/1109.2618>`_, 2012

      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      2022
    """
    splits, deviations = standardised(read_molecules(data_dir, molecules))
    encoder = DenseEncoder(widths=(256, 256, 256))
    heads = Heads(dict.fromkeys(TARGETS, 1))

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, heads_key = jax.random.split(key)
        z, variables = encoder.init_with_output(encoder_key, splits["train"]["features"][:1])
        own = heads.init(heads_key, dict.fromkeys(TARGETS, z))
        return {"encoder": variables["params"], "heads": own["params"]}, {}

    def encode(
        params: PyTree, model_state: PyTree, key: Array | None, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        return encoder.apply({"params": params["encoder"]}, batch["features"]), model_state

    def outputs_of(params: PyTree, zs: Mapping[str, PyTree]) -> dict[str, Float[Array, "batch"]]:
        outputs = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(outputs, dict)
        return {task: output[:, 0] for task, output in outputs.items()}

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        outputs = outputs_of(params, zs)
        return {task: jnp.mean((outputs[task] - batch[task]) ** 2) for task in TARGETS}

    def predict(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Float[Array, "batch"]]:
        z, _ = encode(params, model_state, None, batch)
        return outputs_of(params, dict.fromkeys(TARGETS, z))

    return Problem(
        name="qm9" if molecules is not None else "qm9_all",
        description="A small organic molecule: eleven of its properties, from the charges and the "
        "places of its atoms.",
        tasks={
            # Outputs and labels stay standardised; the deviation brings their errors back.
            task: Task(mean_absolute_error(scale=deviations[task], unit=target.unit))
            for task, target in TARGETS.items()
        },
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        init=init,
        encoder=encode,
        heads=losses_of,
        shared=lambda path: path.startswith("encoder/"),
        predict=predict,
        optimizer=adam_cosine,
        learning_rate=3e-3,
        epochs=20,
        batch_size=128,
    )


def qm9_all(data_dir: str | None = None) -> Problem:
    """Build :func:`qm9` with all molecules."""
    return qm9(data_dir, molecules=None)


# Reading


def read_molecules(data_dir: str | None, molecules: int | None) -> dict[str, Molecules]:
    """The molecules of each split; the arguments are those of :func:`qm9`."""
    if data_dir is not None:
        return _read_prepared(data_dir, molecules)
    return _read_package(molecules)


def split_rows(number: int, molecules: int | None) -> dict[str, np.ndarray]:
    """Which rows of the data are in each split.

    Args:
      number: the number of molecules in the data.
      molecules: as in :func:`qm9`.
    """
    if molecules is None:
        bounds = (110_000, 120_000, max(number, 120_001))
    else:
        molecules = read_integer(molecules, "`molecules`", least=10)
        bounds = (molecules * 8 // 10, molecules * 9 // 10, molecules)
    if bounds[-1] > number:
        raise ValueError(
            f"QM9 has 130,831 molecules, here there are {number:,}: too few for "
            f"{'all of them' if molecules is None else f'`molecules`={molecules:,}'}."
        )
    train, validation, test, _ = np.split(np.random.default_rng(0).permutation(number), bounds)
    return {"train": train, "validation": validation, "test": test}


def _read_package(molecules: int | None) -> dict[str, Molecules]:
    # The package's files are read without it: it imports pkg_resources, which setuptools has no
    # more, and reads all columns.
    import pandas as pd

    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "QM9 is read from the package qm9pack, which is not installed: pip install -e "
            "'.[molecules]' (104 MB). Or give with --data-dir the folder where "
            "tensorflow-datasets has prepared qm9."
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    columns = ["N_atoms", "Elements", "XYZ_Ang", *(target.column for target in TARGETS.values())]
    files = [folder / f"qm9_part{part}.csv" for part in (1, 2, 3)]
    table = pd.concat([pd.read_csv(file, usecols=columns) for file in files], ignore_index=True)

    def read(rows: np.ndarray) -> Molecules:
        chosen = table.iloc[rows]
        is_atom = np.arange(MAX_ATOMS) < chosen["N_atoms"].to_numpy()[:, None]
        charges = np.zeros(is_atom.shape, np.int32)
        charges[is_atom] = [CHARGES[element] for element in _entries(chosen["Elements"])]
        positions = np.zeros((*is_atom.shape, 3))
        positions[is_atom] = np.array(_entries(chosen["XYZ_Ang"]), np.float64).reshape(-1, 3)
        targets = {
            task: target.factor * chosen[target.column].to_numpy(np.float64)
            for task, target in TARGETS.items()
        }
        return Molecules(charges, positions, targets)

    return {split: read(rows) for split, rows in split_rows(len(table), molecules).items()}


def _entries(texts: Sequence[str]) -> list[str]:
    """The entries of lists that are written as texts, of all of them in turn."""
    return ",".join(texts).translate(str.maketrans("", "", "[]' ")).split(",")


def _read_prepared(data_dir: str, molecules: int | None) -> dict[str, Molecules]:
    try:
        source = prepared_sources("qm9/original", data_dir)["train"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\nWithout --data-dir QM9 is read from the package qm9pack: "
            "pip install -e '.[molecules]'."
        ) from None

    def read(rows: np.ndarray) -> Molecules:
        examples: list[dict[str, Any]] = [source[int(row)] for row in rows]

        def gather(field: str) -> np.ndarray:
            return np.array([example[field] for example in examples])

        targets = {
            task: target.factor * gather(target.field).astype(np.float64)
            for task, target in TARGETS.items()
        }
        return Molecules(gather("charges"), gather("positions").astype(np.float64), targets)

    return {split: read(rows) for split, rows in split_rows(len(source), molecules).items()}


# Features and labels


def element_counts(charges: np.ndarray) -> Float[np.ndarray, "molecules elements"]:
    """How many atoms of each of :data:`CHARGES` a molecule has."""
    counts = [(charges == charge).sum(axis=1) for charge in CHARGES.values()]
    return np.stack(counts, axis=1).astype(np.float64)


def coulomb_eigenvalues(
    charges: Int[np.ndarray, "molecules atoms"], positions: Float[np.ndarray, "molecules atoms 3"]
) -> Float[np.ndarray, "molecules atoms"]:
    r"""The eigenvalues of the Coulomb matrix, the largest absolute value first.

    .. math:: M_{ii} = \frac{1}{2} Z_i^{2.4}, \quad M_{ij} = \frac{Z_i Z_j}{|R_i - R_j|}

    with the charges Z and the positions R in atomic units. They do not depend on the order of the
    atoms, nor on where the molecule is and how it is turned.

    Args:
      charges: the atomic numbers, then zeros.
      positions: in angstrom.

    Returns:
      The eigenvalues of each molecule, then zeros.
    """
    found = np.zeros(charges.shape)
    sizes = (charges > 0).sum(axis=1)
    # Molecules of one size at a time: so the matrices are no larger than they must be.
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        z, r = charges[rows, :size].astype(np.float64), positions[rows, :size] / BOHR
        distances = np.linalg.norm(r[:, :, None] - r[:, None], axis=-1)
        atoms = np.arange(size)
        distances[:, atoms, atoms] = 1
        matrices = z[:, :, None] * z[:, None] / distances
        matrices[:, atoms, atoms] = 0.5 * z**2.4
        values = np.linalg.eigvalsh(matrices)
        order = np.argsort(-np.abs(values), axis=1)
        found[rows, :size] = np.take_along_axis(values, order, axis=1)
    return found


def standardised(
    molecules: Mapping[str, Molecules],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """Features and labels, standardised by the training molecules.

    Args:
      molecules: those of each split.

    Returns:
      The splits, with the fields ``features`` and the tasks'; and the deviation of each task in its
      unit.
    """
    counts = {split: element_counts(found.charges) for split, found in molecules.items()}
    splits: dict[str, dict[str, np.ndarray]] = {split: {} for split in molecules}
    deviations = {}

    def add(field: str, values: dict[str, np.ndarray]) -> np.ndarray:
        mean, deviation = values["train"].mean(axis=0), values["train"].std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1)  # such as of an element that is in none
        for split, fields in splits.items():
            fields[field] = ((values[split] - mean) / deviation).astype(np.float32)
        return deviation

    eigenvalues = {
        split: coulomb_eigenvalues(found.charges, found.positions)
        for split, found in molecules.items()
    }
    add(
        "features",
        {split: np.concatenate([eigenvalues[split], counts[split]], axis=1) for split in splits},
    )
    for task in TARGETS:
        values = {split: found.targets[task] for split, found in molecules.items()}
        if task in ENERGIES:
            of_elements = np.linalg.lstsq(counts["train"], values["train"])[0]
            values = {split: values[split] - counts[split] @ of_elements for split in values}
        deviations[task] = float(add(task, values))
    return splits, deviations
