"""Files that are whole or not there, and errors that name the file."""

import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes path's place once the block has ended without an error.

    Raises:
      OSError: naming path, also where the system names no file, as when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Not through whatever lies under this name, which others can foresee.
        unfinished.unlink(missing_ok=True)
        with naming(path), unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an error for which the system names no file, as when the disk is full, name path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _remove_leftovers(path: Path) -> None:
    """What processes that were killed amid `replacing` have left."""
    for left in path.parent.glob(f".{path.name}.*"):
        process = left.name.rpartition(".")[2]
        if process.isdecimal() and not _lives(int(process)):
            left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def locked(folder: Path) -> FileLock:
    """A folder as this process's own until `release`, or its end, even by SIGKILL.

    Raises:
      ValueError: naming the folder, if it is another's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{folder} is in use by another process; wait for its end, or stop it"
        ) from None
    return lock


def read_text(path: Path) -> str:
    """A file's text, in UTF-8 whatever the locale; ValueError that names it if it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def read_npz(path: Path, names: Collection[str]) -> dict[str, NDArray]:
    """The arrays of these names in an .npz.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file and what is wrong with it: no .npz, damaged, an array is missing.
    """
    wanted = f"an .npz of {', '.join(names)}"
    with path.open("rb") as file:  # here, because NumPy leaves a damaged one open
        # NumPy would take any other file for a pickle, and advise to load it unsafely.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} must be {wanted}; it is no .npz, or cut off")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if missing := [name for name in names if name not in arrays]:
                    raise ValueError(f"{path} lacks {', '.join(missing)}; it must be {wanted}")
                return {name: arrays[name] for name in names}
        # What a damaged archive makes of zipfile, zlib and NumPy is no one kind of error.
        except Exception as error:
            if str(error).startswith(str(path)):
                raise
            reason = "it holds Python objects" if "allow_pickle" in str(error) else f"{error}"
            raise ValueError(f"{path} must be {wanted}, and cannot be read: {reason}") from error
