"""A run's latest states on disk, by Orbax: whole or not there, restorable on other devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from lsoftmax_jax.training import State


class Checkpoints(ocp.CheckpointManager):
    """Orbax's manager of the states in a folder; a context manager, so that none is half written.

    Args:
      folder: made if it is not there.
      kept: how many of the latest to keep.
      writes: whether the folder is this process's own; if not, it is left as it is.
    """

    def __init__(self, folder: Path, kept: int = 1, writes: bool = True) -> None:
        self.folder = folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept if writes else None,
            # The next dispatch reuses the memory that is being written.
            enable_async_checkpointing=False,
            read_only=not writes,
        )
        super().__init__(folder.absolute(), options=options)

    def add(self, state: State) -> None:
        """Saves a state, unless it is there."""
        step = int(state.step)
        if step != self.latest_step():
            with _named(self.folder, "no checkpoint could be written"):
                self.save(step, args=ocp.args.StandardSave(state._asdict()))

    def rewind(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self.all_steps():
            if later > step:
                self.delete(later)

    def latest(self, like: State) -> State | None:
        """The newest state; None if there is none.

        Args:
          like: a state, abstract or not, of the same model and optimizer: its shapes, dtypes and
            where its arrays lie.
        """
        step = self.latest_step()
        if step is None:
            return None
        with _named(self.folder, f"the checkpoint of step {step} cannot be read"):
            return State(**self.restore(step, args=ocp.args.StandardRestore(like._asdict())))


@contextmanager
def _named(folder: Path, what: str) -> Iterator[None]:
    """Makes an error of Orbax's, of whatever kind, one that names the folder in a line."""
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
      FileNotFoundError: if there is none; the flag that named the run stands before the message.
    """
    with Checkpoints(run / "checkpoints", writes=False) as checkpoints:
        state = checkpoints.latest(like)
    if state is None:
        raise FileNotFoundError(f"{flag}{run} has no checkpoint yet; train that run first")
    return state


def steps_in(folder: Path) -> set[int]:
    """The steps of the checkpoints in a folder, which need not be there."""
    if not folder.exists():
        return set()
    return {entry.step for entry in ocp.path.step.standard_name_format().find_all(folder)}
