import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pagedtq

project = "pagedtq"
author = copyright = "The pagedtq developers"
release = version = pagedtq.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

# Extras that the docs are built without; the same pages come out where they are installed.
autodoc_mock_imports = ["torch", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"pagedtq {release}"
html_static_path = ["_static"]
