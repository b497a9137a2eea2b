"""The documentation site, `make docs`. Constants are in lower case: Sphinx gives their names."""

import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import figures  # noqa: E402  beside this file
import measured  # noqa: E402  beside this file
import notebook_pages  # noqa: E402  beside this file

import lsoftmax_jax  # noqa: E402  of this clone

project = "lsoftmax_jax"
author = "The lsoftmax_jax authors"
copyright = f"2026, {author}"
version = release = lsoftmax_jax.__version__
pyproject = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
repository = pyproject["project"]["urls"]["Repository"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # the site carries MathJax itself
    "sphinx_copybutton",
]
myst_enable_extensions = ["attrs_inline", "dollarmath", "substitution"]
myst_heading_anchors = 3
myst_substitutions = {
    "clone": f"```sh\ngit clone {repository}\ncd {repository.rpartition('/')[2]}\n```",
    "install": f"```sh\npip install git+{repository}\n```",
    "many_classes_plans": measured.many_classes_plans(),
    "million_classes": measured.million_classes(),
    "notebook_runs": measured.notebooks(),
    "open_set": measured.unseen(),
    "partial_fc": measured.partial_fc(),
    "small_cnn": measured.small_cnn(),
    "stack_runs": measured.stacks(),
    **measured.trained(),
    **measured.every_run(),
}

# The docstrings' Args say types and shapes, so signatures do without them.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
# A name in single backticks is a link where this site has that name, and code elsewhere. A full
# name of this library that is no link is an error.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!lsoftmax_jax\.).*")]

html_theme = "furo"
pygments_dark_style = "github-dark"  # Furo's own underlines the names of modules
html_title = f"lsoftmax_jax {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def without_blank_ends(app: Sphinx, page: nodes.document) -> None:
    """Drops the blank line that ends a doctest in Markdown."""
    for block in page.findall(nodes.literal_block):
        block.rawsource = block.rawsource.rstrip()
        block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", without_blank_ends)
    app.connect("builder-inited", lambda app: figures.write(HERE / "figures"))
    app.connect("builder-inited", lambda app: notebook_pages.write(HERE / "notebooks"))
