"""A full disk at a checkpoint: exit code 2, one line, and nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A limit on the size of files stands in for a full disk.
SCRIPT = """
import resource, sys
from experiments.__main__ import main
if int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
words = "train digits-m4 --steps 3 --width 0.125 --batch 16 --checkpoint-seconds 0 --devices 1"
sys.exit(main([*words.split(), "--out", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.ci
def test_a_checkpoint_that_finds_no_room(kept_programs, tmp_path):
    def train(most, environment):
        return subprocess.run(
            [sys.executable, "-c", SCRIPT, str(most), str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    full = train(20_000, {})  # without kept_programs: half a program would stay
    said = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert full.returncode == 2 and len(said) == 1, full.stderr
    assert "checkpoints: no checkpoint could be written: [Errno 27] File too large" in said[0]
    assert not list(tmp_path.glob("*/*.json"))
    done = train(0, kept_programs)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/*.json"))) == 1
