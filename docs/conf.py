"""How the site of these pages is built: `bash env/docs.sh`.

The folder that is read is the project's root, so that README, CHANGELOG and benchmarks/ are pages of the site too,
and a relative link works there as it does on a code host. Nothing is loaded from elsewhere: formulas become MathML.
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
include_patterns = ["README.md", "CHANGELOG.md", "benchmarks/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "dlion_mpi", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "mathml", "reference"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
smartquotes = False  # they would make a dash of --steps
default_role = "py:obj"  # what docstrings have in single backticks
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
