"""Layers one by one, or as one layer with an axis more: the same model.

A model with `scan_layers` is one layer that runs L times in a loop, so that it
is compiled once, however many layers there are. Its parameters are `layers`,
with an axis [L, ...] in front, where others have `layers_0`, `layers_1`, ...
`stack` and `unstack` turn either tree into the other, and with it whatever has
its form: gradients, moments, a whole state of training.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from joma.transformer import config as configs

STACKED = "layers"
_ONE = re.compile(r"layers_(\d+)")


def stack(tree: PyTree) -> PyTree:
  """Puts `layers_0`, `layers_1`, ... together, wherever they stand."""

  def of_dict(node: dict[str, Any]) -> dict[str, Any]:
    numbers = [int(m[1]) for name in node if (m := _ONE.fullmatch(name))]
    if not numbers:
      return node
    layers = [node[f"layers_{number}"] for number in sorted(numbers)]
    rest = {k: v for k, v in node.items() if not _ONE.fullmatch(k)}
    return rest | {STACKED: jax.tree.map(_together, *layers)}

  return _mapped(tree, of_dict)


def unstack(tree: PyTree) -> PyTree:
  """Takes `layers` apart, wherever they stand; all else stays as it is."""

  def of_dict(node: dict[str, Any]) -> dict[str, Any]:
    if STACKED not in node:
      return node
    rest = {name: value for name, value in node.items() if name != STACKED}
    leaves, treedef = jax.tree.flatten(node[STACKED])
    layers = {
        f"layers_{number}": treedef.unflatten([leaf[number] for leaf in leaves])
        for number in range(len(leaves[0]))
    }
    return rest | layers

  return _mapped(tree, of_dict)


def unrolled(
    config: configs.TransformerConfig,
) -> configs.TransformerConfig:
  """The same model with layers one by one."""
  return dataclasses.replace(config, scan_layers=False)


def _together(*leaves: Any) -> Any:
  if all(isinstance(leaf, np.ndarray) for leaf in leaves):
    return np.stack(leaves)
  return jnp.stack(leaves)


def _mapped(
    tree: PyTree, of_dict: Callable[[dict[str, Any]], dict[str, Any]]
) -> PyTree:
  """Rebuilds a tree, its dictionaries by `of_dict`, the inner ones first."""
  if isinstance(tree, Mapping):
    return of_dict({k: _mapped(v, of_dict) for k, v in tree.items()})
  if isinstance(tree, tuple) and hasattr(tree, "_fields"):
    return type(tree)(*(_mapped(one, of_dict) for one in tree))
  if isinstance(tree, (list, tuple)):
    return type(tree)(_mapped(one, of_dict) for one in tree)
  return tree
