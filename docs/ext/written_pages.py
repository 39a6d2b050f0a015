"""Writes the pages that come from sources before Sphinx reads, and counts them.

The build ends with a warning where a public name has no place on a page.
"""

import pathlib
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.domains import python
from sphinx.util import logging

from docs.ext import api
from docs.ext import tables

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LOG = logging.getLogger(__name__)


def setup(app: Any) -> dict[str, Any]:
  """Connects the steps."""
  for field in python.PyObject.doc_field_types:
    if field.name == "variable":
      field.label = "Attributes"
  app.connect("builder-inited", _write)
  app.connect("doctree-read", _link)
  app.connect("env-check-consistency", _count)
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write(app: Any) -> None:
  folder = pathlib.Path(app.srcdir) / "api"
  folder.mkdir(exist_ok=True)
  texts = api.pages(api.modules(_ROOT))
  for name, text in tables.tables(_ROOT).items():
    update(folder / f"{name}.inc", text)
  for path in folder.glob("*.rst"):
    if path.stem not in texts:
      path.unlink()
  for name, text in texts.items():
    update(folder / f"{name}.rst", text)


def update(path: pathlib.Path, text: str) -> None:
  """Writes a page where it has changed, for Sphinx reads what is newer."""
  if not path.exists() or path.read_text() != text:
    path.write_text(text)


def _link(app: Any, doctree: nodes.document) -> None:
  """Leaves links to this project's names; types of others have no page.

  Without it every `int` of a signature is looked for among all names.
  """
  for node in list(doctree.findall(addnodes.pending_xref)):
    if node.get("refdomain") != "py":
      continue
    if node["reftarget"].split(".")[0] in api.PACKAGES:
      node.attributes.pop("refspecific", None)
    else:
      node.replace_self(_shown(node))


def _shown(node: addnodes.pending_xref) -> list[nodes.Node]:
  """A type's text: the short one where there are two."""
  short = [
      child
      for child in node.children
      if isinstance(child, addnodes.pending_xref_condition)
      and child.get("condition") == "resolved"
  ]
  return short[0].children if short else node.children


def _count(app: Any, env: Any) -> None:
  names = api.public_names(api.modules(_ROOT))
  domain = env.domains["py"]
  known = {*domain.objects, *domain.modules}
  missing = sorted(set(names) - known)
  for name in missing:
    _LOG.warning("%s has no place in the API pages", name)
  share = 1 - len(missing) / len(names)
  _LOG.info("API: %d public names, %.1f %% on pages", len(names), 100 * share)
