"""No mixing: each token by itself, by the parameters that attention has.

  out^n = silu(q^n) * (k^n + silu(v^n))

a gated MLP of as many parameters in the place of attention: the MLP form of
Deconstructing Attention (https://arxiv.org/abs/2510.11602), whose exact MLP is
not given. What attention adds is what a model of it lacks. XLA only.

Paper's settings: 500M parameters, 15B tokens.

Letters: B batch, T tokens, N query heads, K key and value heads, H head size.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks


@dataclasses.dataclass(frozen=True)
class NoMixing:
  """A mixer that mixes nothing."""

  name: ClassVar[str] = "no_mixing"
  paper: ClassVar[str] = "https://arxiv.org/abs/2510.11602"
  neutral: ClassVar[str] = ""

  def mix(
      self,
      params: hooks.Params,
      call: hooks.Call,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      mask: masks.Mask,
  ) -> Float[Array, "B T N H"]:
    """Returns what each token gives; any mask is followed."""
    return gated(query, key, value)

  def init_cache(
      self,
      config: configs.TransformerConfig,
      layer: int,
      batch_size: int,
      capacity: int,
      dtype: jax.typing.DTypeLike,
  ) -> hooks.KVCache:
    """Returns a cache that keeps nothing."""
    return Nothing()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nothing:
  """A KVCache of a layer that needs no other tokens."""

  honours: ClassVar[tuple[str, ...]] = (NoMixing.name,)

  def attend(
      self,
      query: Float[Array, "B T N H"],
      key: Float[Array, "B T K H"],
      value: Float[Array, "B T K H"],
      positions: Int[Array, "B T"],
      rotate: hooks.Rotate,
      options: hooks.AttentionOptions,
  ) -> tuple[Float[Array, "B T N H"], "Nothing"]:
    """Each token by itself."""
    return gated(query, key, value), self


def gated(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
) -> Float[Array, "B T N H"]:
  """The gated units of each token."""
  inner = jnp.repeat(
      key + jax.nn.silu(value), query.shape[2] // key.shape[2], axis=2
  )
  return jax.nn.silu(query) * inner
