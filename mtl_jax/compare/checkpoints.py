"""Checkpoints within a run, by Orbax, each with a digest of what it holds.

A finished run is a record (:mod:`mtl_jax.compare.results`) and needs none of them.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
import time
import warnings
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax._typing import PyTree
from mtl_jax.compare.devices import as_the_first, is_first_process, wait_for_all
from mtl_jax.compare.results import SETTINGS, Run

KEPT = 3
"""How many checkpoints of a run are kept, so that one before a damaged one is there."""

_CURVES = ("weights", "conflict")
"""What a run holds as arrays."""


class SettingsError(ValueError):
    """What is asked for cannot be compared; nothing was trained."""


class OtherSettingsError(SettingsError):
    """What is to be continued was made with other settings or other data."""


@dataclasses.dataclass
class Epoch:
    """The epoch that a run is in.

    Attributes:
      rows: what its steps found, an array for some steps each.
      seconds: how long they took.
    """

    rows: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class RunCheckpoints:
    """The checkpoints of one run; to be used in a ``with`` statement.

    Each is a step of Orbax: ``record``, JSON with what the run found and the digests of the arrays;
    ``arrays``, those of what it found; and ``state``, the state to go on from.

    Args:
      folder: the folder of the run's checkpoints.
      seconds: the least time between two of them: saving takes its share of short steps. 0 for one
        whenever the run looks at what it found.
    """

    def __init__(self, folder: pathlib.Path, seconds: float) -> None:
        self.folder, self._seconds = folder.absolute(), seconds
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        import orbax.checkpoint as ocp  # a second, which is spent only where checkpoints are used

        # What was being written when the process died. Orbax's own option removes it in a thread
        # that outlives a manager, and so from under the next one.
        if is_first_process():
            for unfinished in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                _remove(unfinished)
        wait_for_all("what was being written is removed")
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEPT)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            raise self._not_written(failure) from failure

    def restore(self, run: Run, state: PyTree) -> tuple[Run, Epoch, PyTree] | None:
        """Read the newest good checkpoint. A damaged one is removed, with a warning.

        Args:
          run: the run before its first step.
          state: its state, for structure, shapes and placement.

        Returns:
          The run, its epoch and its state as they were; ``None`` if there is no good checkpoint.

        Raises:
          OtherSettingsError: if the checkpoint is of a run with other settings, or of another
            network.
          OSError: if a file that is there cannot be read now.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, epoch, state_then = self._read(step, state)
            except (OtherSettingsError, MemoryError):
                raise
            except Exception as error:  # damaged files make all kinds
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    raise
                warnings.warn(
                    f"The checkpoint of step {step} in {self.folder} is damaged and left out: "
                    f"{_brief(error)}",
                    stacklevel=2,
                )
                self._manager.delete(step)
                continue
            check_same_settings(run, found, f"The checkpoints in {self.folder} are")
            found.compile_seconds += run.compile_seconds
            found.provenance, before = run.provenance, found.provenance
            if before != run.provenance:
                found.provenance = run.provenance | {"begun with": before}
            return found, epoch, state_then
        return None

    def save(self, step: int, run: Run, epoch: Epoch, state: PyTree) -> None:
        """Save a run in the middle, if it is time.

        Returns once the arrays are copied to the host; files are written in the background.

        Raises:
          OSError: if this or the previous checkpoint could not be written.
        """
        if not as_the_first(time.monotonic() - self._saved >= self._seconds):
            return
        record = dict(vars(run))
        curves = {name: record.pop(name) for name in _CURVES}
        rows = [np.concatenate(epoch.rows)] if epoch.rows else []
        arrays = [*rows, *(values for curve in curves.values() for values in curve.values())]
        trees = {"state": state, "arrays": {str(i): values for i, values in enumerate(arrays)}}
        if not arrays:
            del trees["arrays"]
        # A text, since the run goes on while it is written.
        content = json.dumps(
            {
                "run": record,
                "curves": {name: list(curve) for name, curve in curves.items()},
                "rows": len(rows),
                "seconds": epoch.seconds,
                "digests": {name: digest(tree) for name, tree in trees.items()},
                "structure": _structure(state),
            }
        )
        items: dict[str, Any] = {
            name: self._args.StandardSave(tree) for name, tree in trees.items()
        }
        items["record"] = self._args.JsonSave({"content": content, "digest": _digest(content)})
        try:
            self._manager.save(step, args=self._args.Composite(**items), force=True)
        except Exception as error:
            raise self._not_written(error) from error
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove them all; the run is finished. To be called after the ``with`` statement."""
        wait_for_all("all have left the run")
        if is_first_process():
            _remove(self.folder)

    def _read(self, step: int, state: PyTree) -> tuple[Run, Epoch, PyTree]:
        record = self._restore(step, record=self._args.JsonRestore())["record"]
        _check(_digest(record["content"]) == record["digest"], "record")
        content = json.loads(record["content"])
        if content["structure"] != _structure(state):
            raise OtherSettingsError(
                f"The checkpoints in {self.folder} are of another network, optimizer or weighting: "
                "the training state has other arrays. Go on with the old one, or begin with the "
                "new one in another folder."
            )
        targets = {"arrays": None, "state": state}
        trees = self._restore(
            step,
            **{name: self._args.StandardRestore(targets[name]) for name in content["digests"]},
        )
        for name, expected in content["digests"].items():
            _check(digest(trees[name]) == expected, name)
        arrays = trees.get("arrays", {})
        in_order = iter([np.asarray(arrays[str(i)]) for i in range(len(arrays))])
        epoch = Epoch([next(in_order) for _ in range(content["rows"])], content["seconds"])
        curves: dict[str, Any] = {
            name: {key: next(in_order) for key in keys} for name, keys in content["curves"].items()
        }
        return Run(**content["run"], **curves), epoch, trees["state"]

    def _restore(self, step: int, **items: Any) -> dict[str, Any]:
        return dict(self._manager.restore(step, args=self._args.Composite(**items)).items())

    def _not_written(self, error: Exception) -> OSError:
        return OSError(
            f"A checkpoint in {self.folder} could not be written, as when the disk is full; those "
            f"before it are kept. {_brief(error)}"
        )


def check_same_settings(run: Run, found: Run, what: str) -> None:
    """Whether a run that was found is the one that is wanted.

    Raises:
      OtherSettingsError: if not.
    """
    check_same(
        {name: getattr(run, name) for name in SETTINGS},
        {name: getattr(found, name) for name in SETTINGS},
        f"{what} of a run with other settings",
    )


def check_same(now: dict[str, Any], then: dict[str, Any], what: str) -> None:
    """Whether two sets of settings are the same.

    Raises:
      OtherSettingsError: if not; it says what differs.
    """
    changes = [
        f"the {name} differ"
        if name == "data"
        else f"{name} is {now[name]!r} and was {then[name]!r}"
        for name in now
        if now[name] != then[name]
    ]
    if changes:
        raise OtherSettingsError(
            f"{what}: {'; '.join(changes)}. Go on with the old ones, or begin with the new ones in "
            "another folder."
        )


def digest(tree: PyTree) -> str:
    """The SHA-256 digest of a pytree of arrays: of paths, dtypes, shapes and bytes.

    Args:
      tree: arrays and PRNG keys, which must be whole on this process.

    Returns:
      The digest, in hexadecimal digits.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import digest
      >>> state = {"params": jnp.ones(3), "step": jnp.int32(7)}
      >>> digest(state) == digest({"params": jnp.ones(3), "step": jnp.int32(7)})
      True
      >>> digest(state) == digest({"params": jnp.ones(3), "step": jnp.int32(8)})
      False
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = ""
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path)
        found.update(f"{name} {kind} {array.dtype} {np.shape(leaf)}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _structure(tree: PyTree) -> str:
    """A digest of paths, dtypes and shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return _digest(
        "\n".join(f"{jax.tree_util.keystr(path)} {x.dtype} {np.shape(x)}" for path, x in leaves)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check(as_written: bool, name: str) -> None:
    if not as_written:
        raise ValueError(f"its {name} is not what was written (the digests differ)")


def _brief(error: Exception) -> str:
    """The beginning and the end of a message, which from below can be pages long."""
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:150]} ... {text[-200:]}"


def _remove(folder: pathlib.Path) -> None:
    """Remove a folder in which TensorStore may still be at work after a write has failed."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(folder)  # raises the reason
