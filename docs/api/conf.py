"""Sphinx builds the API reference from the docstrings: `make docs`, or sphinx-build -W -n docs/api docs/api/_build."""

from typing import Any

from sphinx.ext.autodoc.mock import _MockObject

from distopt import __version__

project, release = "distopt", __version__
author = copyright = "The distopt developers"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
exclude_patterns = ["_build"]
default_role = "code"  # what stands between single backticks
napoleon_use_rtype = False  # the types stand in the signatures; what a docstring says of a result is text

# Hosts need not be installed for their adapters to be described.
autodoc_mock_imports = ["accelerate", "deepspeed", "flwr", "lightning", "transformers"]
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
add_module_names = False
# What stands for their classes must bear `Class | None`, which Sphinx's stand-in does not.
_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: Any

# What stands where a type is expected must be one. Types of other packages are described there; those that distopt
# has for itself, and those that are imported for type checkers alone, are not described.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"\w+(\.\w+)+"), ("py:class", "Console|DDPAlgorithm|Part|Scaler|Tensor")]
suppress_warnings = ["ref.python"]  # a name that two parts of distopt have, given as text in an alias of a type

# Napoleon takes what stands before the first colon of a property's text for its type. Their texts are sentences, and
# are put back after it (it has priority 500).
_sentences = {}


def keep(app, what, name, subject, options, lines):
    if what in ("attribute", "property", "data"):
        _sentences[name] = list(lines)


def show_indented(app, what, name, subject, options, lines):
    """Equations and code are indented in a docstring, after an empty line: shown as they stand."""
    for i in range(len(lines) - 1, 1, -1):
        before = next((line for line in reversed(lines[:i]) if line), "")
        begins = lines[i].startswith("    ") and not lines[i - 1] and not before.startswith(" ")
        if begins and not before.endswith("::"):
            lines[i:i] = ["::", ""]


def put_back(app, what, name, subject, options, lines):
    if name in _sentences:
        lines[:] = _sentences.pop(name)


def setup(app):
    app.connect("autodoc-process-docstring", keep, priority=100)
    app.connect("autodoc-process-docstring", show_indented, priority=200)
    app.connect("autodoc-process-docstring", put_back, priority=900)
