"""How `make docs` renders these pages, and the reference from docstrings."""

from typing import Any

from sphinx.application import Sphinx

from fomaml_fused.version import __version__

project = "fomaml-fused"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"fomaml-fused {version}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings quote code in single backticks, as Markdown does; what is documented here becomes a link.
default_role = "py:obj"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100

NOT_FOR_USERS_TO_MAKE = {"AdaptedMLP", "InnerLosses", "Plan", "LayerPlan", "Estimate", "FirstOrderGap"}


def without_signature(app: Sphinx, what: str, name: str, *_: Any) -> tuple[str, None] | None:
    """Of what functions return, how it is made says nothing."""
    return ("", None) if what == "class" and name.split(".")[-1] in NOT_FOR_USERS_TO_MAKE else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", without_signature)
