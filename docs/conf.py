"""The site: `sphinx-build -W -b html docs build/site`, without network.

Pages are Markdown; those of the API and the tables are written by `docs/ext`
from docstrings before Sphinx reads them, and no module is imported for it:
scripts define flags when they are imported, and some want a peer's library.

SCANSNAP_NOTEBOOKS says which notebooks are executed: `light` (by default) those
of seconds, `all`, or `none`. What was executed is kept in build/notebooks, and
is executed again where its code has changed.
"""

import os
import pathlib
import sys
import tomllib

_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))
# Notebooks import this tree, and look for no accelerator.
os.environ["PYTHONPATH"] = str(_ROOT)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
_HEAVY = (
    "notebooks/checkpoint",
    "notebooks/joma_invariant",
    "notebooks/new_system",
    "notebooks/policy_table",
)

project = "scansnap-jax"
author = _PROJECT["authors"][0]["name"]
release = _PROJECT["version"]
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docs.ext.written_pages",
    "docs.ext.mathml",
]
# package.md is the page of a package index.
exclude_patterns = ["package.md", "ext"]
nitpicky = False  # Types of other libraries have no page here.
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 76
toc_object_entries = False

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_block"]
myst_heading_anchors = 4
suppress_warnings: list[str] = []

_CHOICE = os.environ.get("SCANSNAP_NOTEBOOKS", "light")
if _CHOICE not in ("none", "light", "all"):
  raise ValueError(
      f"SCANSNAP_NOTEBOOKS={_CHOICE!r} must be none, light or all."
  )
nb_execution_mode = "off" if _CHOICE == "none" else "cache"
nb_execution_cache_path = str(_ROOT / "build" / "notebooks")
nb_execution_excludepatterns = (
    [] if _CHOICE == "all" else [f"{page}*" for page in _HEAVY]
)
nb_execution_timeout = 240
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # Progress.

html_theme = "furo"
html_title = "scansnap-jax"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1b5e8c",
        "color-brand-content": "#1b5e8c",
    },
    "dark_css_variables": {
        "color-brand-primary": "#8cc4ee",
        "color-brand-content": "#8cc4ee",
    },
}
