"""The notebooks as pages of the site: their text and code, without outputs."""

import json
import re
from pathlib import Path

from experiments.store.files import replacing

NOTEBOOKS = Path(__file__).parents[1] / "experiments" / "notebooks"
# An image from elsewhere; the link stays.
BADGE = re.compile(r"\[!\[(Open in Colab)\]\(\S+?\)\]")


def write(folder: Path) -> None:
    """NAME.md of every notebook."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        with replacing(folder / f"{notebook.stem}.md") as file:
            file.write(page(notebook).encode())


def page(notebook: Path) -> str:
    """A notebook's cells as Markdown."""
    cells = []
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cells.append(BADGE.sub(r"[\1]", source))
        else:
            cells.append(f"```python\n{source}\n```")
    return "\n\n".join(cells) + "\n"
