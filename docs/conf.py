"""Sphinx configuration of the site: `bash env/docs.sh`.

The source folder is the project's root, so that README, CHANGELOG and benchmarks/ are pages of the site, and relative
links work as on a code host. The site loads nothing from other hosts: formulas become MathML.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

from dlion_mpi import __version__  # noqa: E402

project = "DLion over MPI"
author = "the authors of DLion over MPI"
release = version = __version__
copyright = "Apache-2.0"

root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "dlion_mpi", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "mathml", "reference"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
smartquotes = False  # they would turn --steps into a dash
default_role = "py:obj"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
html_math_renderer = "mathml"

html_theme = "furo"
html_title = f"DLion over MPI {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options: dict[str, list[str]] = {"footer_icons": []}
pygments_style = "friendly"
pygments_dark_style = "monokai"
