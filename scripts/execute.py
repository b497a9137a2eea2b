"""Executes a notebook in this environment and folder; prints how long it took, in JSON.

python scripts/execute.py NOTEBOOK.ipynb

What its cells print goes to standard error. The kernel is the environment's own Python.
"""

import json
import resource
import sys
import time
from typing import Any

import nbformat
from nbclient import NotebookClient


def execute(notebook: Any) -> dict[str, int]:
    """Seconds of its first code cell, which installs; of the others; of processors, in all."""
    began, ended = time.monotonic(), []
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": "."}},
        on_cell_executed=lambda **_: ended.append(time.monotonic()),
    )
    client.execute()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "installing": round(ended[0] - began),
        "seconds": round(time.monotonic() - ended[0]),
        "processor_seconds": round(used.ru_utime + used.ru_stime),
    }


if __name__ == "__main__":
    notebook = nbformat.read(sys.argv[1], as_version=4)
    try:
        took = execute(notebook)
    finally:
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                print(output.get("text", ""), end="", file=sys.stderr)
    print(json.dumps(took))
