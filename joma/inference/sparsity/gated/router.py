"""A method in every layer of a Transformer; texts are measured whole.

Letters: B texts, T tokens, D width, L layers.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.sparsity.gated import methods
from joma.inference.sparsity.gated import weights as weights_lib
from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer import routing

COLLECTION = "sparsity"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("config", "method", "prompt_len"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRouter:
  """A `routing.Router` that computes MLPs, or attention too, by a method.

  Attributes:
    arrays: What the method was calibrated to, leaves [L, ...]. With
      `least_query`, `least_key`, `least_value` or `least_out` among them inputs
      below are left out of that matrix of attention too, as TEAL does.
    config: The model's.
    method: Of the MLPs; None computes them whole.
    prompt_len: Tokens of each text that are dense.
  """

  arrays: Mapping[str, Any]
  config: configs.TransformerConfig
  method: methods.Method | None = None
  prompt_len: int = 0

  def route(
      self,
      layer: int,
      x: Float[Array, "B T D"],
      x_before: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      kv_cache: Any,
  ) -> "_Route":
    """Returns the way through a layer; see `routing.Router`."""
    del x, x_before, kv_cache
    arrays = jax.tree.map(lambda leaf: leaf[layer], dict(self.arrays))
    is_prompt = (positions < self.prompt_len) & (positions >= 0)
    return _Route(self, arrays, is_prompt, is_prompt | (positions < 0))


class _Route(routing.Products):
  """One call of one layer; sows how many weights were read."""

  def __init__(
      self,
      router: MethodRouter,
      arrays: Mapping[str, Any],
      is_prompt: Array,
      is_left_out: Array,
  ):
    self._router, self._arrays = router, arrays
    self._is_prompt, self._is_left_out = is_prompt, is_left_out

  def product(self, dense: nn.Module, x: Array) -> Array:
    """A product of attention, of large inputs where a threshold rules."""
    least = self._arrays.get(f"least_{dense.name}")
    if least is None:
      return dense(x)
    axes = tuple(range(2, x.ndim))
    kept = methods.is_large(x, least)
    share = kept.mean(axis=axes, dtype=jnp.float32)
    out = dense(jnp.where(kept | jnp.expand_dims(self._is_prompt, axes), x, 0))
    self._sow(dense, share * dense.variables["params"]["kernel"].size)
    return out

  def mlp(
      self,
      apply_mlp: mlp.Mlp,
      mlp_in: Float[Array, "B T D"],
      resid: Float[Array, "B T D"],
  ) -> Float[Array, "B T D"]:
    """By the method, but for the prompt's tokens."""
    del resid
    dense, router = apply_mlp(mlp_in), self._router
    if router.method is None:
      return dense
    params = apply_mlp.variables["params"]
    layer = weights_lib.of_layer(router.config, params)
    x = mlp_in.astype(jnp.float32)
    found = router.method.update(layer, x, self._arrays)
    self._sow(apply_mlp, found.read)
    is_prompt = self._is_prompt[..., None]
    return jnp.where(is_prompt, dense, found.out.astype(dense.dtype))

  def _sow(self, module: nn.Module, read: Float[Array, "B T"]) -> None:
    counted = jnp.where(self._is_left_out, 0, read).sum()
    module.sow(COLLECTION, "read", counted)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("shifts",),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class ShiftRouter:
  """A `routing.Router` that adds `shifts` [L, B, T, D] to what MLPs return.

  The loss's gradient at shifts of 0 says how much each MLP's error costs.
  """

  shifts: Float[Array, "L B T D"]

  def route(
      self,
      layer: int,
      x: Array,
      x_before: Array,
      positions: Array,
      kv_cache: Any,
  ) -> "_Shift":
    """Returns the way through a layer; see `routing.Router`."""
    del x, x_before, positions, kv_cache
    return _Shift(self.shifts[layer])


class _Shift(routing.Products):

  def __init__(self, shift: Float[Array, "B T D"]):
    self._shift = shift

  def product(self, dense: nn.Module, x: Array) -> Array:
    """As it is."""
    return dense(x)

  def mlp(
      self,
      apply_mlp: mlp.Mlp,
      mlp_in: Float[Array, "B T D"],
      resid: Float[Array, "B T D"],
  ) -> Float[Array, "B T D"]:
    """Shifted."""
    del resid
    out = apply_mlp(mlp_in)
    return out + self._shift.astype(out.dtype)
