"""Tox21: twelve assays of a molecule's toxicity, many of them not made for every molecule."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int8, PyTree, UInt8

from experiments.networks.heads import Heads
from experiments.problems.classification import MISSING, adam_cosine
from mtl_jax._checks import check_option
from mtl_jax._masking import masked_mean
from mtl_jax.compare.data import Batch
from mtl_jax.compare.metrics import roc_auc
from mtl_jax.compare.problem import Problem, Task

ASSAYS = (
    "NR-AR",
    "NR-AR-LBD",
    "NR-AhR",
    "NR-Aromatase",
    "NR-ER",
    "NR-ER-LBD",
    "NR-PPAR-gamma",
    "SR-ARE",
    "SR-ATAD5",
    "SR-HSE",
    "SR-MMP",
    "SR-p53",
)
"""The columns of the table: seven assays of nuclear receptors, five of the response to stress."""

BITS = 2048
RADIUS = 2
FILES = ("tox21.csv", "tox21.csv.gz")


def tox21(
    data_dir: str | None = None, *, split: Literal["scaffold", "random"] = "scaffold"
) -> Problem:
    """Build Tox21 with a task for each assay, which is to tell whether a molecule is active.

    The table is MoleculeNet's: 7,831 molecules, 3 to 16 % of the labels of an assay positive, 17 %
    of all labels missing. RDKit refuses 8 of the molecules, which are left out. The input is the
    Morgan fingerprint of a molecule: each of 2,048 bits says whether it has one of certain
    neighbourhoods, of up to two bonds around an atom.

    A tenth of the molecules is held out for validation and a tenth for the test. Of the two ways to
    choose them that by scaffold is the harder one: the molecules of the test are unlike those of
    the training (:func:`scaffold_split`). A ridge regression for each assay on these fingerprints,
    its penalty chosen on validation, reaches a mean ROC-AUC of 72.0 % by scaffold and of 81.1 % at
    random. Published are 81 to 85 % (Commun. Chem., 2025, s42004-025-01683-z, table 1, seven
    models). That compares loosely: the rows of a split differ from paper to paper, and the network,
    its training and the plain cross entropy, where MoleculeNet gives positives a higher weight, are
    our own.

    Args:
      data_dir: the folder with ``tox21.csv``, or ``tox21.csv.gz`` as MoleculeNet has it.
      split: how validation and test are chosen: ``"scaffold"`` or ``"random"``.

    Returns:
      The problem, with the tasks :data:`ASSAYS`.

    Raises:
      FileNotFoundError: if the table is not there.
      ValueError: if a column of it is missing, RDKit is not installed, or ``split`` is unknown.

    References:
      Wu et al., `MoleculeNet: A Benchmark for Molecular Machine Learning
      <https://arxiv.org/abs/1703.00564>`_, 2018

      Huang et al., `Tox21Challenge to Build Predictive Models of Nuclear Receptor and Stress
      Response Pathways <https://doi.org/10.3389/fenvs.2015.00085>`_, 2016

      Rogers and Hahn, `Extended-Connectivity Fingerprints <https://doi.org/10.1021/ci100050t>`_,
      2010
    """
    check_option(split, ("scaffold", "random"), "`split` of tox21")
    smiles, labels = read_table(data_dir)
    known, fingerprints, scaffolds = featurize(smiles)
    rows = scaffold_split(scaffolds) if split == "scaffold" else random_split(len(scaffolds))
    labels = labels[known]
    splits = {
        part: {"fingerprint": fingerprints[chosen]}
        | {assay: labels[chosen, number] for number, assay in enumerate(ASSAYS)}
        for part, chosen in rows.items()
    }
    return fingerprint_problem(
        "tox21" if split == "scaffold" else "tox21_random",
        splits,
        description="Molecules by their fingerprints; in which of twelve assays is one active? "
        f"{len(smiles) - len(known)} molecules that RDKit refuses are left out; validation and "
        f"test are chosen {'by scaffold' if split == 'scaffold' else 'at random'}.",
    )


def tox21_random(data_dir: str | None = None) -> Problem:
    """Build :func:`tox21` with molecules for validation and test that are chosen at random."""
    return tox21(data_dir, split="random")


class FingerprintEncoder(nn.Module):
    """Dense layers over the bits of a fingerprint, with dropout before and after each.

    Attributes:
      widths: the features of each layer.
      bit_dropout: the share of bits that are dropped in training.
      dropout: the share of features that are dropped in training.
    """

    widths: Sequence[int] = (256, 256)
    bit_dropout: float = 0.2
    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, bits: UInt8[Array, "batch bits"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Encode fingerprints."""
        x = nn.Dropout(self.bit_dropout, deterministic=not train)(bits.astype(jnp.float32))
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return x


def fingerprint_problem(
    name: str, splits: Mapping[str, Mapping[str, np.ndarray]], description: str
) -> Problem:
    """The problem over the fields ``fingerprint`` and, 0, 1 or :data:`MISSING`, the assays'."""
    encoder, heads = FingerprintEncoder(), Heads(dict.fromkeys(ASSAYS, 1))

    def init(key: Array) -> tuple[PyTree, PyTree]:
        encoder_key, heads_key = jax.random.split(key)
        bits = jnp.asarray(splits["train"]["fingerprint"][:1])
        z, variables = encoder.init_with_output(encoder_key, bits)
        heads_variables = heads.init(heads_key, dict.fromkeys(ASSAYS, z))
        return {"encoder": variables["params"], "heads": heads_variables["params"]}, {}

    def encode(
        params: PyTree, model_state: PyTree, key: Array, batch: Batch
    ) -> tuple[PyTree, PyTree]:
        variables, rngs = {"params": params["encoder"]}, {"dropout": key}
        return encoder.apply(variables, batch["fingerprint"], train=True, rngs=rngs), model_state

    def logits_of(params: PyTree, zs: Mapping[str, PyTree]) -> dict[str, Float[Array, "batch"]]:
        logits = heads.apply({"params": params["heads"]}, zs)
        assert isinstance(logits, dict)
        return {assay: values[:, 0] for assay, values in logits.items()}

    def losses_of(
        params: PyTree, zs: Mapping[str, PyTree], batch: Batch
    ) -> dict[str, Float[Array, ""]]:
        logits = logits_of(params, zs)
        return {assay: binary_cross_entropy(logits[assay], batch[assay]) for assay in ASSAYS}

    def predict(
        params: PyTree, model_state: PyTree, batch: Batch
    ) -> dict[str, Float[Array, "batch"]]:
        z = encoder.apply({"params": params["encoder"]}, batch["fingerprint"])
        return logits_of(params, dict.fromkeys(ASSAYS, z))

    def labelled(batch: Batch) -> dict[str, Bool[Array, "batch"]]:
        return {assay: batch[assay] != MISSING for assay in ASSAYS}

    return Problem(
        name=name,
        description=description,
        tasks={assay: Task(roc_auc()) for assay in ASSAYS},
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        init=init,
        encoder=encode,
        heads=losses_of,
        shared=lambda path: path.startswith("encoder/"),
        predict=predict,
        labelled=labelled,
        optimizer=adam_cosine,
        learning_rate=3e-3,
        epochs=10,
        batch_size=128,
    )


def binary_cross_entropy(
    logits: Float[Array, "batch"], labels: Int8[Array, "batch"]
) -> Float[Array, ""]:
    """The mean cross entropy of the examples whose label is not :data:`MISSING`."""
    present = labels != MISSING
    values = optax.sigmoid_binary_cross_entropy(logits, jnp.where(present, labels, 0))
    return masked_mean(values, present)


def read_table(data_dir: str | None) -> tuple[list[str], Int8[np.ndarray, "molecules assays"]]:
    """The SMILES of the molecules, and their labels: 0, 1 or :data:`MISSING`."""
    import pandas as pd

    path = _find_table(data_dir)
    columns = [*ASSAYS, "smiles"]
    table = pd.read_csv(path, usecols=lambda column: column in columns, dtype={"smiles": str})
    absent = [column for column in columns if column not in table]
    if absent:
        raise ValueError(f"{path} is not MoleculeNet's table: it has no column {absent[0]!r}.")
    table = table.dropna(subset=["smiles"])
    found = table[list(ASSAYS)].fillna(MISSING)
    labels = found.to_numpy(np.float64)
    if not np.isin(labels, (0, 1, MISSING)).all():
        raise ValueError(f"{path}: a label is 0, 1 or empty, and there are others.")
    labels = labels.astype(np.int8)
    return table["smiles"].tolist(), labels


def _find_table(data_dir: str | None) -> pathlib.Path:
    for name in FILES:
        if data_dir is not None and (path := pathlib.Path(data_dir) / name).exists():
            return path
    where = "No folder was given" if data_dir is None else f"There is none in {data_dir}"
    raise FileNotFoundError(
        f"Tox21 is read from {' or '.join(FILES)}, the table of MoleculeNet. {where}: download "
        "https://deepchemdata.s3-us-west-1.amazonaws.com/datasets/tox21.csv.gz and give its folder "
        "with --data-dir. The fingerprints take RDKit: pip install -e '.[molecules]'"
    )


def featurize(
    smiles: Sequence[str],
) -> tuple[list[int], UInt8[np.ndarray, "known bits"], list[str]]:
    """What RDKit makes of the molecules.

    Args:
      smiles: the molecules.

    Returns:
      The positions of the molecules that it reads, their Morgan fingerprints, and the SMILES of
      their Bemis-Murcko scaffolds, without chirality: the rings and what links them, ``""`` for a
      molecule without a ring.

    Raises:
      ValueError: if RDKit is not installed.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import rdFingerprintGenerator
        from rdkit.Chem.Scaffolds import MurckoScaffold
    except ModuleNotFoundError as error:
        raise ValueError(
            "Fingerprints of molecules take RDKit, which is not installed: "
            "pip install -e '.[molecules]'"
        ) from error

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    known, fingerprints, scaffolds = [], [], []
    with rdBase.BlockLogs():  # it reports every molecule that it doubts or refuses
        for number, text in enumerate(smiles):
            molecule = Chem.MolFromSmiles(text)
            if molecule is not None:
                known.append(number)
                fingerprints.append(generator.GetFingerprintAsNumPy(molecule))
                scaffolds.append(MurckoScaffold.MurckoScaffoldSmiles(mol=molecule))
    return known, np.array(fingerprints, np.uint8).reshape(-1, BITS), scaffolds


def scaffold_split(scaffolds: Sequence[str]) -> dict[str, np.ndarray]:
    """Split molecules 80/10/10 so that those of one scaffold stay together.

    As in DeepChem's ``ScaffoldSplitter``, which MoleculeNet uses: the scaffolds are taken by their
    number of molecules, the largest first, of equal ones that whose first molecule comes last. All
    molecules of a scaffold go to the training split while it stays within 80 % of the molecules,
    else to validation while the two stay within 90 %, else to the test. So validation and test
    consist of molecules with rare scaffolds.

    Args:
      scaffolds: the scaffold of each molecule.

    Returns:
      The molecules of each split, in their order.
    """
    groups: dict[str, list[int]] = {}
    for number, scaffold in enumerate(scaffolds):
        groups.setdefault(scaffold, []).append(number)
    train, validation, test = [], [], []
    for group in sorted(groups.values(), key=lambda group: (len(group), group[0]), reverse=True):
        if len(train) + len(group) <= 0.8 * len(scaffolds):
            train += group
        elif len(train) + len(validation) + len(group) <= 0.9 * len(scaffolds):
            validation += group
        else:
            test += group
    parts = {"train": train, "validation": validation, "test": test}
    return {part: np.sort(np.array(rows, int)) for part, rows in parts.items()}


def random_split(number: int) -> dict[str, np.ndarray]:
    """Split so many molecules 80/10/10 at random, the same way at every call."""
    order = np.random.default_rng(0).permutation(number)
    train, validation, test = np.split(order, [number * 8 // 10, number * 9 // 10])
    return {"train": train, "validation": validation, "test": test}
