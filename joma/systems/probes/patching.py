"""Patching: heads of one run put what they said in another (mediation).

  patch = patching.Patch(head_out, at, is_patched)
  logits = model.apply(variables, tokens, router=patch)

At one token of each text chosen heads have the output that they had on another
text, and everything behind them follows. What the answer does then is what goes
through these heads (https://arxiv.org/abs/2403.19521).

Letters: B texts, L layers, N heads, H head size, T tokens, D width.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from joma.transformer import routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
  """Which heads say what they said elsewhere: a `routing.Router`.

  Attributes:
    head_out: What they said, before the output projection.
    at: The token of each text that is patched.
    is_patched: Which heads.
  """

  head_out: Float[Array, "B L N H"]
  at: Int[Array, "B"]
  is_patched: Bool[Array, "L N"]

  def route(
      self,
      layer: int,
      x: Float[Array, "B T D"],
      x_before: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      kv_cache: PyTree,
  ) -> "_Patched":
    """As in `routing.Router`."""
    del x, x_before, positions, kv_cache
    return _Patched(self.head_out[:, layer], self.at, self.is_patched[layer])


@dataclasses.dataclass(frozen=True)
class _Patched(routing.Products):
  """One layer: a `routing.Route`."""

  head_out: Array
  at: Array
  is_patched: Array

  def product(self, dense: nn.Module, x: Array) -> Array:
    if dense.name == "out":
      is_token = jnp.arange(x.shape[1])[None] == self.at[:, None]
      chosen = jnp.einsum("BT,N->BTN", is_token, self.is_patched)
      x = jnp.where(chosen[..., None], self.head_out[:, None], x)
    return dense(x)  # type: ignore[not-callable]


def head_outs(
    seen: Mapping[str, Any], num_layers: int, at: Int[Array, "B"]
) -> Float[Array, "B L N H"]:
  """What every head said at one token of each text.

  Args:
    seen: What a Transformer has sown, under "intermediates".
    num_layers: L.
    at: The token.
  """
  sown, place = seen["intermediates"], at[:, None, None, None]
  return jnp.stack(
      [
          jnp.take_along_axis(
              sown[f"layers_{layer}"]["attn"]["head_out"][0], place, axis=1
          )[:, 0]
          for layer in range(num_layers)
      ],
      axis=1,
  )
