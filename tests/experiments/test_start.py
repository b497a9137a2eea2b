"""A command does not wait for libraries that only other commands use."""

import subprocess
import sys

HEAVY = ("sklearn", "pandas", "scipy.stats", "skimage.transform", "matplotlib.pyplot")


def test_the_commands_load_no_library_that_takes_seconds():
    asked = "import sys, experiments.__main__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True
    )
    assert not set(HEAVY) & set(loaded.stdout.split())
