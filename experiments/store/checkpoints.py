"""A run's latest state and a note on disk, by Orbax: whole or not there, for any devices."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.store.files import regular
from lsoftmax_jax.training import State


class Checkpoints(ocp.CheckpointManager):
    """Orbax's manager of the states in a folder, as a context manager.

    Args:
      folder: made if this process writes.
      writes: whether the folder is this process's own; if not, the folder is left as it is.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1 if writes else None,
            # The next dispatch donates the state, so the state must be written before.
            enable_async_checkpointing=False,
            # Orbax's read_only says the same, and logs three warnings.
            create=writes,
        )
        if writes and jax.process_index() == 0:
            # Remove what a kill left. Orbax's own option removes it in a thread, maybe too late.
            for left in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left)
        super().__init__(folder.absolute(), options=options)

    def add(self, state: State, note: dict[str, Any]) -> None:
        """Saves a state, unless it is there.

        Args:
          state: of the run.
          note: what else the run needs to continue there, as JSON.
        """
        step = int(state.step)
        if step != self.latest_step():
            saved = ocp.args.StandardSave(state._asdict())
            with _named(self.folder, "no checkpoint could be written"):
                self.save(step, args=saved, custom_metadata=note)

    def latest(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest state and its note; None if there is none.

        Args:
          like: a state, abstract or not, of the same model and optimizer: its shapes, dtypes and
            where its arrays lie.

        Raises:
          ValueError: naming the folder, if the checkpoint cannot be read.
        """
        step = self.latest_step()
        if step is None:
            return None
        with _named(self.folder, f"the checkpoint of step {step} cannot be read"):
            for file in (self.folder / str(step)).rglob("*"):
                if not file.is_dir():
                    regular(file)
            state = State(**self.restore(step, args=ocp.args.StandardRestore(like._asdict())))
            return state, self.metadata(step).custom_metadata


@contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    """Makes an error of Orbax's, of whatever kind, a line that names the folder."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # another process is lost
    except Exception as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{folder}: {what}: {reason:.300}") from error


def last_state(run: Path, like: State, flag: str = "") -> State:
    """The newest state of a run's folder, as `Checkpoints.latest`; writes nothing.

    Raises:
      FileNotFoundError: there is no checkpoint; the message begins with the flag that named it.
    """
    with Checkpoints(run / "checkpoints", writes=False) as checkpoints:
        found = checkpoints.latest(like)
    if found is None:
        raise FileNotFoundError(f"{flag}{run} has no checkpoint yet; train that run first")
    return found[0]


def steps_in(folder: Path) -> set[int]:
    """The steps of the checkpoints in a folder; none if there is no folder."""
    if not folder.exists():
        return set()
    return {entry.step for entry in ocp.path.step.standard_name_format().find_all(folder)}
