"""Checkpoints of the runs of a comparison, by Orbax, each with a digest of what it holds."""

import dataclasses
import json
import os
import pathlib
import shutil
import time
import urllib.parse
import warnings
from types import TracebackType
from typing import Any, Self

import numpy as np

from mtl_jax._typing import PyTree
from mtl_jax.compare.devices import is_first_process, wait_for_all
from mtl_jax.compare.fingerprint import (
    Fingerprint,
    OtherConfigurationError,
    difference,
    digest,
    text_digest,
)
from mtl_jax.compare.run import Run, folder_name

_ARRAY = "array of the history"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and how often the runs of a comparison are checkpointed.

    A run is checkpointed after an epoch, and at its end. What a finished run found is kept, and its
    parameters and states are not.

    Attributes:
      folder: the folder for the checkpoints.
      seconds: the least time between two checkpoints of a run: saving takes its share of short
        epochs, and of their measured times. 0 for a checkpoint after every epoch.
      keep: how many checkpoints of a run are kept while it is not finished.
      resume: whether to go on from the checkpoints that are in the folder. Without it they are an
        error.
    """

    folder: str | os.PathLike[str]
    seconds: int = 10
    keep: int = 3
    resume: bool = False

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"`{name}` of the checkpoints must be at least {least}, got "
                    f"{getattr(self, name)}."
                )

    def begin(self, problem: str) -> None:
        """Make the folder of a problem's runs.

        Raises:
          FileExistsError: if it is there, and the comparison is not to be resumed.
        """
        folder = self._folder(problem)
        if folder.exists() and not self.resume:
            raise FileExistsError(
                f"{folder} holds the checkpoints of another comparison on {problem!r}. Continue it "
                "with resume=True, or choose another folder, or remove this one."
            )
        wait_for_all("the folder of the checkpoints is looked at")
        folder.mkdir(parents=True, exist_ok=True)

    def of_run(self, problem: str, name: str, seed: int) -> "RunCheckpoints":
        """The checkpoints of the run of that name and seed, to be used in a ``with`` statement."""
        return RunCheckpoints(self._folder(problem) / f"{folder_name(name)}_seed{seed}", self)

    def _folder(self, problem: str) -> pathlib.Path:
        return pathlib.Path(self.folder).absolute() / folder_name(problem)


class RunCheckpoints:
    """The checkpoints of one run: a step of Orbax for each epoch that was saved.

    A step holds the record, which is JSON: what was found up to then, the fingerprint of the run's
    configuration and the digests of the arrays; ``history``, the arrays of what was found; and
    ``state``, the state to go on from, if the run is not finished.
    """

    def __init__(self, folder: pathlib.Path, options: Checkpoints) -> None:
        self.folder, self._options = folder, options
        self._fingerprint: Fingerprint = {}

    def __enter__(self) -> Self:
        import orbax.checkpoint as ocp  # only where checkpoints are used

        # What was being written when the process died. Orbax's own option removes it in a thread
        # that outlives a manager, and so from under the next one.
        if is_first_process():
            for unfinished in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                _remove(unfinished)
        wait_for_all("what was being written is removed")
        when = ocp.checkpoint_managers
        seconds = self._options.seconds
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._options.keep,
                save_decision_policy=when.ContinuousCheckpointingPolicy(
                    minimum_interval_secs=seconds
                )
                if seconds
                else when.FixedIntervalPolicy(1),
            ),
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

    def restore(self, fingerprint: Fingerprint, state: PyTree) -> tuple[Run, PyTree] | None:
        """Read the newest good checkpoint. A damaged one is removed, with a warning.

        Args:
          fingerprint: of the configuration; what is saved later is of this one, too.
          state: the state that the run would start from, for structure, shapes and placement.

        Returns:
          The run as it was and its state, which is ``state`` if the run was finished; ``None`` if
          there is no good checkpoint.

        Raises:
          OtherConfigurationError: if the checkpoint is of another configuration.
        """
        self._fingerprint = fingerprint
        for epoch in sorted(self._manager.all_steps(), reverse=True):
            try:
                run, saved = self._read(epoch, state)
            except OtherConfigurationError:
                raise
            except Exception as error:  # damaged files make all kinds
                warnings.warn(
                    f"The checkpoint of epoch {epoch} in {self.folder} is damaged and left out: "
                    f"{_brief(error)}",
                    stacklevel=2,
                )
                self._manager.delete(epoch)
                continue
            if saved is None:
                self._keep_only(epoch)
            return run, state if saved is None else saved
        return None

    def save(self, run: Run, state: PyTree, finished: bool) -> None:
        """Save the run and its state after an epoch, if it is time or the run is finished.

        Returns once the arrays are copied to the host; files are written in the background. A
        finished run is waited for, and what it had saved before is removed.

        Raises:
          OSError: if this or the previous checkpoint could not be written.
        """
        if not finished and not self._manager.should_save(run.epochs):
            return
        record, history = _split(run)
        trees = {} if finished else {"state": state}
        if history:
            trees["history"] = history
        # A text, since the run goes on while it is written.
        content = json.dumps(
            {
                "fingerprint": self._fingerprint,
                "run": record,
                "digests": {name: digest(tree) for name, tree in trees.items()},
            }
        )
        items: dict[str, Any] = {
            name: self._args.StandardSave(tree) for name, tree in trees.items()
        }
        items["record"] = self._args.JsonSave({"content": content, "digest": text_digest(content)})
        try:
            self._manager.save(run.epochs, args=self._args.Composite(**items), force=True)
            if finished:
                self._manager.wait_until_finished()
                self._keep_only(run.epochs)
        except Exception as error:
            raise self._not_written(error) from error

    def _keep_only(self, last: int) -> None:
        for epoch in set(self._manager.all_steps()) - {last}:
            self._manager.delete(epoch)

    def _read(self, epoch: int, state: PyTree) -> tuple[Run, PyTree | None]:
        record = self._restore(epoch, record=self._args.JsonRestore())["record"]
        _check(text_digest(record["content"]) == record["digest"], "record")
        content = json.loads(record["content"])
        if changed := difference(self._fingerprint, content["fingerprint"]):
            raise OtherConfigurationError(
                f"The checkpoints in {self.folder} are of another configuration: {changed}. "
                "Go on with the old one, or begin with the new one in another folder."
            )
        targets = {"history": None, "state": state}
        trees = self._restore(
            epoch,
            **{name: self._args.StandardRestore(targets[name]) for name in content["digests"]},
        )
        for name, expected in content["digests"].items():
            _check(digest(trees[name]) == expected, name)
        return _join(content["run"], trees.get("history", {})), trees.get("state")

    def _restore(self, epoch: int, **items: Any) -> dict[str, Any]:
        if not items:
            return {}
        return dict(self._manager.restore(epoch, args=self._args.Composite(**items)).items())

    def _not_written(self, error: Exception) -> OSError:
        return OSError(
            f"A checkpoint in {self.folder} could not be written, as when the disk is full; those "
            f"before it are kept. {_brief(error)}"
        )


def _remove(folder: pathlib.Path) -> None:
    """Remove a folder in which TensorStore may still be at work after a write has failed."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
    shutil.rmtree(folder)  # raises the reason


def problems_in(folder: pathlib.Path) -> set[str]:
    """The names of the problems that have checkpoints in the folder."""
    if not folder.exists():
        return set()
    return {urllib.parse.unquote(path.name) for path in folder.iterdir() if path.is_dir()}


def _split(run: Run) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What JSON can hold of a run, with the names of the arrays in their places, and the arrays."""
    arrays: dict[str, np.ndarray] = {}

    def take_out(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: take_out(entry) for key, entry in value.items()}
        if not isinstance(value, np.ndarray):
            return value
        name = f"array_{len(arrays)}"
        arrays[name] = value
        return {_ARRAY: name}

    return take_out(vars(run)), arrays


def _join(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Run:
    def put_back(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if _ARRAY in value:
            return arrays[value[_ARRAY]]
        return {key: put_back(entry) for key, entry in value.items()}

    return Run(**put_back(record))


def _brief(error: Exception) -> str:
    """The beginning and the end of a message, which from below can be pages long."""
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:150]} ... {text[-200:]}"


def _check(as_written: bool, name: str) -> None:
    if not as_written:
        raise ValueError(f"its {name} is not what was written (the digests differ)")
