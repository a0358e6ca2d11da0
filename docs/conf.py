"""Sphinx configuration: `make docs` writes build/docs and fails on any warning."""

from __future__ import annotations

from qwen35.version import __version__

project = "qwen35"
author = "the qwen35 authors"
release = version = __version__

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["generating"]
nitpicky = True

myst_heading_anchors = 4
"""Give headings the same anchors as GitHub, so that links work in both places."""

smartquotes = False
pygments_style = "default"
html_theme = "furo"
html_title = "qwen35"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
