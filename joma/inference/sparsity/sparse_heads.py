"""The heads of a `SparseTransformer`: measured, decoded.

Letters: B batch, T tokens, D width, N heads, K KV heads, H size of a head, S
chosen heads, R kept inputs.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.sparsity import lazy_kv
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity import sparsity_metrics
from joma.inference.sparsity import unit_rules
from joma.transformer import hooks
from kernels_pallas.gather_mlp import heads as gather_heads
from kernels_pallas.gather_mlp import selection
from scansnap_jax.experiment import errors

COLLECTION = "sparsity"


def matrices(
    params: Mapping[str, Any], dtype: jax.typing.DTypeLike
) -> dict[str, Array]:
  """The projections of attention with a matrix [H, D] a head."""
  names = ("query", "key", "value")
  kernel = lambda name: params[name]["kernel"].astype(dtype)
  found = {name: kernel(name).transpose(1, 2, 0) for name in names}
  return found | {"out": kernel("out")}


class Measured:
  """Drops heads from an attention that computes all."""

  def __init__(
      self,
      call: plan_lib.PlanCall,
      rule: unit_rules.HeadRule,
      resid: Array,
      x: Array,
  ):
    self._call, self._rule = call, rule
    self._chosen: Bool[Array, "B T N"] | None = None
    if self._rule.chosen_by == "predicted":
      self._chosen = self._keep(self._rule.scores(call.arrays, resid))
    elif self._rule.chosen_by == "random":
      shape = (*x.shape[:2], call.config.num_heads)
      self._chosen = self._keep(self._rule.drawn(shape, call.layer))

  def _keep(self, scores: Float[Array, "B T N"]) -> Bool[Array, "B T N"]:
    kept = self._rule.keep(scores, self._call.arrays)
    return kept | self._call.is_prompt[..., None]

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Masks keys and values by the rule, and the heads' outputs."""
    if dense.name in ("key", "value") and self._rule.missing_kv == "zero":
      assert self._chosen is not None, "An oracle knows no keys beforehand."
      kept = unit_rules.kv_heads(self._chosen, self._call.config.num_kv_heads)
      return jnp.where(kept[..., None], dense(x), 0)
    if dense.name != "out":
      return dense(x)
    kernel = dense.variables["params"]["kernel"]
    strengths = sparsity_labels.head_strengths(x, kernel, self._call.plan.label)
    # An oracle chooses by the outputs, which are here for the first time.
    chosen = self._chosen
    chosen = self._keep(strengths) if chosen is None else chosen
    masked = jnp.where(chosen[..., None], x, 0)
    if dense.is_mutable_collection(COLLECTION):
      self._sow(dense, x, masked, strengths, chosen, kernel)
    return dense(masked)

  def _sow(
      self,
      dense: nn.Module,
      x: Float[Array, "B T N H"],
      masked: Float[Array, "B T N H"],
      strengths: Float[Array, "B T N"],
      chosen: Bool[Array, "B T N"],
      kernel: Float[Array, "N H D"],
  ) -> None:
    call, num_heads = self._call, strengths.shape[-1]
    num = call.plan.num_positive_heads or self._rule.number(call.arrays)
    num = num_heads if num is None else num
    positive = sparsity_labels.keep_top(strengths, num)
    read = lambda heads: jnp.einsum("BTNH,NHD->BTD", heads, kernel)
    counted = ~call.is_prompt & (call.positions >= 0)
    sums = sparsity_metrics.count(
        chosen, positive, strengths, read(masked), read(x), counted
    )
    dense.sow(COLLECTION, "heads", sums)
    kept = unit_rules.kv_heads(chosen, call.config.num_kv_heads)
    kept = (kept & counted[..., None]).sum(dtype=jnp.float32)
    dense.sow(COLLECTION, "kv_heads", kept / call.config.num_kv_heads)


class Decoded:
  """Computes the chosen heads of one token of each sequence."""

  def __init__(
      self,
      call: plan_lib.PlanCall,
      rule: unit_rules.HeadRule,
      resid: Float[Array, "B 1 D"],
      cache: hooks.KVCache,
  ):
    self._call, self._rule, self._cache = call, rule, cache
    num_heads = call.config.num_heads
    if self._rule.chosen_by == "random":
      scores = self._rule.drawn((resid.shape[0], num_heads), call.layer)
    else:
      scores = self._rule.scores(call.arrays, resid[:, 0])
    self.chosen = self._rule.keep(scores, call.arrays)
    self._num = self._rule.num or num_heads
    self._ids, self._valid = _list(self.chosen, self._num)
    kept = unit_rules.kv_heads(self.chosen, call.config.num_kv_heads)
    self._kv = kept
    # At a flush all heads are made: their inputs are overwritten from now on.
    if isinstance(cache, lazy_kv.LazyKV):
      self._kv = kept | cache.is_flush
    elif self._rule.missing_kv == "recompute":
      raise errors.UserError(
          "missing_kv=recompute wants the caches of `init_cache`, which keep"
          f" inputs; got a {type(cache).__name__}."
      )

  def cache(self, x: Float[Array, "B 1 D"]) -> hooks.KVCache:
    """The cache, told what is computed for this token."""
    if isinstance(self._cache, lazy_kv.LazyKV):
      return self._cache.with_step(x[:, 0], self._kv)
    return self._cache

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Projects into and out of what is chosen."""
    is_dense = self._num == self._call.config.num_heads
    if dense.name in ("key", "value"):
      return self._key_or_value(dense, x)
    # All heads by number: nothing to gather. Above a threshold may be fewer.
    if is_dense and self._rule.num is not None:
      return dense(x)
    return self._out(dense, x) if dense.name == "out" else self._in(dense, x)

  def _in(
      self, dense: nn.Module, x: Float[Array, "B 1 D"]
  ) -> Float[Array, "B 1 N H"]:
    kernel = self._call.arrays["attn"]["query"]
    found = gather_heads.project_in(
        x[:, 0].astype(kernel.dtype), kernel, self._ids, num_valid=self._valid
    )
    query = _scatter(found, self._ids, kernel.shape[0])[:, None]
    return _plus_bias(query, dense, self.chosen)

  def _out(
      self, dense: nn.Module, x: Float[Array, "B 1 N H"]
  ) -> Float[Array, "B 1 D"]:
    kernel = self._call.arrays["attn"]["out"]
    some = jnp.take_along_axis(x[:, 0], self._ids[..., None], axis=1)
    out = gather_heads.project_out(
        some.astype(kernel.dtype), kernel, self._ids, num_valid=self._valid
    )[:, None]
    bias = dense.variables["params"].get("bias")
    return out if bias is None else out + bias.astype(out.dtype)[None, None]

  def _key_or_value(
      self, dense: nn.Module, x: Array
  ) -> Float[Array, "B _ K H"]:
    rule = self._rule.missing_kv
    if rule == "always_compute_kv":
      return dense(x)
    kernel = self._call.arrays["attn"][dense.name]
    x = x.astype(kernel.dtype)
    if rule == "zero":
      return self._some(dense, x, kernel)
    # Kept inputs first, then the new one: the cache knows which are missing.
    assert isinstance(self._cache, lazy_kv.LazyKV)  # Or it was refused.
    cache = self._cache
    x = jnp.concatenate([cache.x.astype(x.dtype), x], axis=1)
    # One dense product at a flush, instead of a list that names every head.
    return jax.lax.cond(
        cache.is_flush[0, 0],
        lambda: _plus_bias(_project(x, kernel), dense, self._kv),
        lambda: self._some(dense, x, kernel),
    )

  def _some(
      self,
      dense: nn.Module,
      x: Float[Array, "B T D"],
      kernel: Float[Array, "K H D"],
  ) -> Float[Array, "B T K H"]:
    """Keys or values of the chosen KV heads, 0 of the others."""
    batch, num_tokens = x.shape[:2]
    num_kv_heads = kernel.shape[0]
    ids, valid = _list(self._kv, min(self._num, num_kv_heads))
    # A row a token: each has the list of its sequence.
    many = lambda y: jnp.repeat(y, num_tokens, axis=0)
    found = gather_heads.project_in(
        x.reshape(batch * num_tokens, -1),
        kernel,
        many(ids),
        num_valid=many(valid),
    )
    found = _scatter(found, many(ids), num_kv_heads)
    found = found.reshape(batch, num_tokens, *found.shape[1:])
    return _plus_bias(found, dense, self._kv)


def _project(x: Float[Array, "B T D"], kernel: Float[Array, "K H D"]) -> Array:
  return jnp.einsum("BTD,KHD->BTKH", x, kernel)


def _list(
    chosen: Bool[Array, "B N"], num: int
) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
  scores = jnp.where(chosen, 1.0, -jnp.inf)
  return selection.top_blocks(scores, num)


def _scatter(
    found: Float[Array, "B S H"], ids: Int[Array, "B S"], num_heads: int
) -> Float[Array, "B N H"]:
  """[B, S, H] to [B, N, H]; what is past the list's number is 0 already."""
  batch = found.shape[0]
  shape = (batch, num_heads, found.shape[-1])
  return (
      jnp.zeros(shape, found.dtype)
      .at[jnp.arange(batch)[:, None], ids]
      .set(found)
  )


def _plus_bias(
    found: Float[Array, "B T N H"],
    dense: nn.Module,
    chosen: Bool[Array, "B N"],
) -> Float[Array, "B T N H"]:
  """Adds the bias of chosen heads to [B, T, N, H]."""
  bias = dense.variables["params"].get("bias")
  if bias is None:
    return found
  bias = bias.astype(found.dtype)[None, None]
  return found + jnp.where(chosen[:, None, :, None], bias, 0)
