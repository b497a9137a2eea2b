"""A run's latest states on disk, by Orbax: whole or not there, restorable on other devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsoftmax_jax.training import State


class Checkpoints:
    """The checkpoints in a folder; a context manager, so that nothing is left half written.

    Args:
      folder: made if it is not there.
      kept: how many of the latest to keep.
      writes: whether the folder is this process's own; if not, it is left as it is.
    """

    def __init__(self, folder: Path, kept: int = 1, writes: bool = True) -> None:
        self._folder = folder
        # Not asynchronous: the next dispatch reuses the memory that is being written.
        options = (
            ocp.CheckpointManagerOptions(max_to_keep=kept, enable_async_checkpointing=False)
            if writes
            else ocp.CheckpointManagerOptions(read_only=True)
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()

    def save(self, state: State) -> None:
        step = int(state.step)
        if step != self._manager.latest_step():
            with _named(self._folder, "no checkpoint could be written"):
                self._manager.save(step, args=ocp.args.StandardSave(state._asdict()))

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def rewind(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in self._manager.all_steps():
            if later > step:
                self._manager.delete(later)

    def latest(self, like: State) -> State | None:
        """The newest state; None if there is none.

        Args:
          like: a state, abstract or not, of the same model and optimizer: its shapes, dtypes and
            where its arrays lie.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            like._asdict(),
        )
        with _named(self._folder, f"the checkpoint of step {step} cannot be read"):
            return State(**self._manager.restore(step, args=ocp.args.StandardRestore(abstract)))


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


def replicated(state: State, mesh: Mesh) -> State:
    """An abstract state, such as `jax.eval_shape` gives, with all of it on every device."""
    whole = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), state
    )


def steps_in(folder: Path) -> set[int]:
    """The steps of the checkpoints in a folder, which need not be there."""
    if not folder.exists():
        return set()
    return {entry.step for entry in ocp.path.step.standard_name_format().find_all(folder)}
