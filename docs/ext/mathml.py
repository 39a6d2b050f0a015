"""Formulas as MathML: browsers draw it, and no script is fetched."""

from typing import Any

from docutils import nodes
from latex2mathml import converter


def setup(app: Any) -> dict[str, Any]:
  """Adds the renderer `mathml` to Sphinx."""
  app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(translator: Any, node: nodes.math) -> None:
  translator.body.append(converter.convert(node.astext()))
  raise nodes.SkipNode


def _display(translator: Any, node: nodes.math_block) -> None:
  formula = converter.convert(node.astext(), display="block")
  translator.body.append(f'<div class="formula">{formula}</div>\n')
  raise nodes.SkipNode
