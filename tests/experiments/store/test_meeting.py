"""A process whose partner never comes gives up in time, with a clear error."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.ci
def test_a_partner_that_never_comes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["train", "digits-m4", "--out", str(tmp_path), "--coordinator", f"localhost:{port}"]
    words += ["--processes", "2", "--process", "0", "--heartbeat-seconds", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,  # JAX alone would wait for 300 seconds
    )
    assert done.returncode == 2
    where = f"localhost:{port}"
    assert done.stderr.splitlines() == [
        f"waiting for 2 processes at {where}, at most 3 seconds (--heartbeat-seconds)",
        f"error: not all 2 processes came to {where} within 3 seconds (--heartbeat-seconds)",
    ]
