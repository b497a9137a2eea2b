"""Several processes that train as one: how they meet, agree, wait for each other and part.

All of them run the same code on the same host arrays, and the arrays on the mesh are replicated, so
they take the same turns by themselves wherever these depend on numbers alone. What depends on time
or signals has to be `agreed`. Their files must be in one file system that all of them see; the
first process alone writes logs and results and speaks.
"""

import json
import os
import socket
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Meeting(NamedTuple):
    """Where processes meet; a process of its own by default.

    Attributes:
      coordinator: HOST:PORT of process 0, with a free port that all can reach.
      processes: how many processes train together.
      process: number of this process, from 0 on.
      cluster: ask SLURM, Cloud TPU or Open MPI for the three above.
      heartbeat_seconds: the others give a process up that is silent, or late to the start, for
        this long.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    cluster: bool = False
    heartbeat_seconds: int = 100


ALONE = Meeting()
# XLA waits this much longer than this module, so that this module reports a late process.
GRACE_SECONDS = 60


@contextmanager
def joined(meeting: Meeting) -> Iterator[None]:
    """Joins the others before this process has used a device; ends it if it loses them.

    Raises:
      ValueError: if the meeting is not fully described, or no cluster is found. If not all come,
        the process ends with exit code 2 and a line that says so.
    """
    if not _wanted(meeting):
        yield
        return
    if meeting.process == 0:
        _check_port_is_free(meeting)
    where = meeting.coordinator or "the cluster's own place"
    seconds = f"{meeting.heartbeat_seconds} seconds (--heartbeat-seconds)"
    _say(f"waiting for {meeting.processes or 'all'} processes at {where}, at most {seconds}")
    # When partners do not come, XLA aborts the process. This timer ends the process before, with
    # a message.
    number = f" {meeting.processes}" if meeting.processes else ""
    given_up = f"error: not all{number} processes came to {where} within {seconds}"
    late = threading.Timer(meeting.heartbeat_seconds, _end, (2, given_up))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            meeting.coordinator,
            meeting.processes,
            meeting.process,
            initialization_timeout=meeting.heartbeat_seconds + GRACE_SECONDS,
            heartbeat_timeout_seconds=meeting.heartbeat_seconds,
            shutdown_timeout_seconds=meeting.heartbeat_seconds,
        )
    except jax.errors.JaxRuntimeError as error:
        said, of = str(error).splitlines()[0], number or " all"
        raise ValueError(f"no meeting of{of} processes at {where}: {said}") from error
    except ValueError as error:
        if not meeting.cluster:
            raise
        raise ValueError(
            f"--cluster found none ({error}); name it by --coordinator, --processes and --process"
        ) from error
    finally:
        late.cancel()
    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if is_first() else nowhere),
        ):
            yield
    except jax.errors.JaxRuntimeError as error:
        # An ordinary exit would wait for the lost process, and then abort.
        _end(
            1,
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, most "
            "likely because another one ended; the same command on any number of processes "
            f"continues from the last checkpoint\n{error}",
        )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end(code: int, text: str) -> None:
    """Ends the process at once, from any thread: no exception of one ends XLA's wait in another."""
    _say(text)
    os._exit(code)


def _wanted(meeting: Meeting) -> bool:
    """Whether there is a meeting at all; ValueError if half of one is described."""
    coordinator, processes, process = explicit = meeting[:3]
    if meeting.heartbeat_seconds < 1:
        raise ValueError(f"heartbeat-seconds must be >= 1, got {meeting.heartbeat_seconds}")
    if explicit == (None, None, None):
        return meeting.cluster
    if meeting.cluster:
        raise ValueError("--cluster finds coordinator, processes and process: give none of them")
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "--coordinator, --processes and --process belong together, got "
            f"coordinator {coordinator}, processes {processes}, process {process}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"coordinator must be HOST:PORT, port 1 to 65535, got {coordinator!r}")
    if not 0 <= process < processes:
        raise ValueError(f"process must be in 0..{processes - 1}, got {process}")
    return True


def _check_port_is_free(meeting: Meeting) -> None:
    """Binds the coordinator's port and lets it go: XLA shares a port in use, and may crash."""
    port = int(str(meeting.coordinator).rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(
            f"coordinator must have a free port, {meeting.coordinator} cannot be bound: "
            f"{error.strerror}"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def agreed(wish: bool) -> bool:
    """Whether the wish of any process is true. Every process must call this."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(wish))))


def gathered(value: Any) -> list[Any]:
    """A value of each process, as JSON, in their order. Every process must call this."""
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    padded = np.pad(mine, (0, sizes.max() - len(mine)))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def wait(point: str) -> None:
    """Returns when every process has come to this point."""
    multihost_utils.sync_global_devices(point)


def check_same(text: str, what: str) -> None:
    """Raises ValueError if processes have different texts."""
    sums = multihost_utils.process_allgather(np.uint32(zlib.crc32(text.encode())))
    if np.any(sums != sums[0]):
        raise ValueError(f"all processes need the same {what}, they have different ones")
