"""The documentation site: `make docs`. Sphinx's own names, hence lower case."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import figures  # noqa: E402  beside this file

import lsoftmax_jax  # noqa: E402  of this clone

project = "lsoftmax_jax"
author = "The lsoftmax_jax authors"
copyright = f"2026, {author}"
version = release = lsoftmax_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3

# The docstrings' Args say types and shapes; overloads would repeat every signature.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
# What a docstring has in backticks is a link where this site has the name, and code elsewhere; a
# full name of ours has to be one.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lsoftmax_jax\.).*")]

html_theme = "furo"
html_title = f"lsoftmax_jax {version}"
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def without_blank_ends(app: Sphinx, page: nodes.document) -> None:
    """A doctest in Markdown ends in a blank line, which nobody has to see."""
    for block in page.findall(nodes.literal_block):
        block.rawsource = block.rawsource.rstrip()
        block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", without_blank_ends)
    app.connect("builder-inited", lambda app: figures.write(HERE / "figures"))
