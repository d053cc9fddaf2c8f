"""The documentation site: `sphinx-build -W docs FOLDER` with the extra `docs`."""

import sigmarep

project = "sigmarep"
author = "The sigmarep authors"
release = version = sigmarep.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "sigmarep"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# Types stand in the signatures; docstrings have shapes and units.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Flax's own methods and dataclass fields of every module would hide the few that matter.
autodoc_default_options = {"members": True, "exclude-members": "parent, name, scope, setup"}
# Links to files of the repository, which are no pages of the site.
suppress_warnings = ["myst.xref_missing"]

SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Attributes:", "Note:")


def plain_text(app, what, name, obj, options, lines):
    """Makes marks of reStructuredText mean themselves and indented blocks code: docstrings are plain text."""
    for i, line in enumerate(lines):
        following = next((each for each in lines[i + 1 :] if each.strip()), "")
        deeper = len(following) - len(following.lstrip()) > len(line) - len(line.lstrip())
        text = line.replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
        block = text.endswith(":") and text.strip() not in SECTIONS and deeper and not lines[i + 1].strip()
        lines[i] = text + ":" if block else text


def skip_generated(app, what, name, obj, skip, options):
    """Fields of named tuples and dataclasses stand in the signature."""
    return skip or str(getattr(obj, "__doc__", "")).startswith("Alias for field number")


def setup(app):
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    app.connect("autodoc-skip-member", skip_generated)
