"""The notebooks as pages of the site: text, code, and the outputs that their files hold."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from experiments.store.files import replacing

NOTEBOOKS = Path(__file__).parents[1] / "experiments" / "notebooks"
# What a terminal reads as a colour.
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# The badge is a picture on another site; the link stays.
BADGE = re.compile(r"\[!\[(Open in Colab)\]\(\S+?\)\]")


def write(folder: Path) -> None:
    """Writes NAME.md and its pictures, NAME-NUMBER.png, for every notebook."""
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, pictures = page(notebook)
        for name, picture in pictures.items():
            with replacing(folder / name) as file:
                file.write(picture)
        with replacing(folder / f"{notebook.stem}.md") as file:
            file.write(text.encode())


def page(notebook: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their file names."""
    blocks: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            blocks.append(BADGE.sub(r"[\1]", source))
            continue
        blocks.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data: dict[str, Any] = output.get("data", {})
            if "image/png" in data:
                name = f"{notebook.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                blocks.append(f"![What the cell above draws]({name})")
            elif "text/markdown" in data:
                blocks.append("".join(data["text/markdown"]))
            else:
                printed = "".join(output.get("text", data.get("text/plain", "")))
                blocks.append(f"```text\n{COLOUR.sub('', printed).rstrip()}\n```")
    return "\n\n".join(blocks) + "\n", pictures
