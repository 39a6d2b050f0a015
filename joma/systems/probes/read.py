"""Several probes over all layers, as sums over texts that can be added.

  found = read.text_sums(wanted, maps, resid, is_token)    under jit
  means = read.means(found)                               of each layer, head
  rows = read.rows(means)                                 one number a layer

Letters: B texts, L layers, N heads, T tokens, D width.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from joma.systems.probes import maps as maps_lib
from joma.systems.probes import names
from joma.systems.probes import stream


class TextSums(NamedTuple):
  """Sums over texts.

  Attributes:
    values: Of each probe, [L, ...].
    num_texts: Texts that have a token.
  """

  values: dict[str, Float[Array, "L *v"]]
  num_texts: Float[Array, ""]


def text_sums(
    wanted: tuple[str, ...],
    maps: Sequence[Float[Array, "#B N T T"]],
    resid: Float[Array, "B M T D"],
    is_token: Bool[Array, "B T"],
    has_weights: Sequence[bool] | None = None,
) -> TextSums:
  """Sums probes over texts.

  Args:
    wanted: Of `names.PROBES`, but for that of updates.
    maps: Attention weights of each layer.
    resid: The residual stream before each layer and after the last, M = L + 1;
      may be anything where no name asks for it.
    is_token: Which positions are no padding; that is at the end.
    has_weights: Which layers have weights: sums of others are 0. None is all.
  """
  of_maps = tuple(name for name in wanted if name in maps_lib.PROBES)
  layers = [maps_lib.text_sums(of_maps, one, is_token) for one in maps]
  for layer, has in enumerate(has_weights or ()):
    if not has:
      layers[layer] = {k: jnp.zeros_like(v) for k, v in layers[layer].items()}
  values = {name: jnp.stack([one[name] for one in layers]) for name in of_maps}
  if "secondary_sinks" in wanted:
    values["secondary_sinks"] = stream.text_sums(resid, is_token)
  return TextSums(values, is_token.any(axis=1).sum().astype(jnp.float32))


def means(found: TextSums) -> dict[str, Float[np.ndarray, "L *v"]]:
  """Means over texts, by layer and, where it has heads, by head."""
  number = np.float64(found.num_texts)
  values = {}
  # In the order of the list: jax sorts the names of a dict.
  for name in names.PROBES:
    if name in found.values:
      mean = jnp.asarray(found.values[name] / number)
      values[name] = np.asarray(maps_lib.of_mean(name, mean))
  return values


def rows(
    means: Mapping[str, Float[np.ndarray, "L *v"]],
) -> dict[str, Float[np.ndarray, "L"]]:
  """One number a layer: means over heads, `local` as `local_0` and so on."""
  found: dict[str, np.ndarray] = {}
  for name, value in means.items():
    value = np.asarray(value, np.float64)
    if name == "local":
      for back in range(value.shape[-1]):
        found[f"local_{back}"] = value[..., back].mean(axis=-1)
    else:
      found[name] = value.mean(axis=-1) if value.ndim > 1 else value
  return found


def row_names(wanted: tuple[str, ...]) -> tuple[str, ...]:
  """The names that `rows` gives, before anything is measured."""
  found: list[str] = []
  for name in (name for name in names.PROBES if name in wanted):
    if name == "local":
      found += [f"local_{back}" for back in range(maps_lib.NUM_LOCAL)]
    else:
      found.append(name)
  return tuple(found)
