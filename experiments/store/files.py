"""Files that are whole or not there, and errors that name the file."""

import os
import shutil
import stat
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes path's place once the block has ended without an error.

    A link stays: its target is replaced. The new file has the mode of the old one.

    Raises:
      ValueError: path is a folder, a named pipe, a socket or a device.
      OSError: naming path, also where the system names no file, as when the disk is full; or path
        may not be written, or its mode cannot be kept.
    """
    target = Path(os.path.realpath(path))
    old = regular(path)
    if old and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} may not be written")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        # The name is predictable: remove a link of this name, do not follow it.
        unfinished.unlink(missing_ok=True)
        with naming(path), open(unfinished, "xb") as file:
            if old:
                shutil.copymode(target, unfinished)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def regular(path: Path) -> os.stat_result | None:
    """The status of a regular file, through links; None if there is no file.

    Raises:
      ValueError: naming path, if something else is there. Opening a named pipe would wait for ever.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"{path} must be a regular file, it is {kind}")
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes an error for which the system names no file, as when the disk is full, name path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


class InUse(ValueError):
    """Another process holds the lock of a folder."""


def locked(folder: Path) -> FileLock:
    """Locks a folder for this process until `release`, or the process's end, even by SIGKILL.

    Raises:
      InUse: naming the folder, if another process holds its lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(
            f"{folder} is in use by another process; wait for its end, or stop it"
        ) from None
    return lock


def in_home(path: str | Path, instead: str) -> Path:
    """A path whose ~ is the user's home folder.

    Raises:
      ValueError: there is no home folder, as for some users of containers; `instead` is the cure.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: this user has no home folder; {instead}") from error


def user_cache() -> Path:
    """Where this project keeps what it can make again."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return in_home(cache, "set XDG_CACHE_HOME") / "lsoftmax_jax"


def read_text(path: Path) -> str:
    """A file's text, in UTF-8 whatever the locale.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, if it is no regular file or no text in UTF-8.
    """
    regular(path)
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
    regular(path)
    wanted = f"an .npz of {', '.join(names)}"
    with path.open("rb") as file:  # opened here, because NumPy leaves a damaged file open
        # NumPy would take any other file for a pickle, and advise to load it unsafely.
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{path} must be {wanted}; it is no .npz, or cut off")
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as arrays:
                if missing := [name for name in names if name not in arrays]:
                    raise ValueError(f"{path} lacks {', '.join(missing)}; it must be {wanted}")
                return {name: arrays[name] for name in names}
        # A damaged archive makes zipfile, zlib and NumPy raise errors of many kinds.
        except Exception as error:
            if str(error).startswith(str(path)):
                raise
            reason = "it holds Python objects" if "allow_pickle" in str(error) else f"{error}"
            raise ValueError(f"{path} must be {wanted}, and cannot be read: {reason}") from error
