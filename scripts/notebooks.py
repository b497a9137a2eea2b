"""Makes the notebooks of a folder, NAME.ipynb, from the scripts beside them, NAME.py.

python scripts/notebooks.py experiments/notebooks
"""

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook(script: Path) -> Any:
    """The script's cells without outputs; the same script gives the same bytes."""
    made = jupytext.read(script, fmt="py:percent")
    made.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(made.cells):
        cell.id = f"{script.stem}-{number}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(made)
    return made


def text(script: Path) -> str:
    """The file of its notebook."""
    return nbformat.writes(notebook(script)) + "\n"


if __name__ == "__main__":
    for script in sorted(Path(sys.argv[1]).glob("*.py")):
        script.with_suffix(".ipynb").write_text(text(script))
        print(f"{script.with_suffix('.ipynb')} written")
