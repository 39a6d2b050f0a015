"""The heads of a `SparseTransformer`: measured, decoded.

Letters: B batch, T tokens, D width, N heads, K KV heads, H size of a head, S
chosen heads, R kept inputs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from joma.inference.sparsity import lazy_kv
from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity import sparsity_metrics
from joma.inference.sparsity import unit_rules
from kernels_pallas.gather_mlp import heads as gather_heads
from kernels_pallas.gather_mlp import selection
from scansnap_jax.experiment import errors

COLLECTION = "sparsity"


def matrices(params: Mapping[str, Any], dtype: Any) -> dict[str, Array]:
  """The projections of attention with a matrix [H, D] a head."""
  names = ("query", "key", "value")
  kernel = lambda name: params[name]["kernel"].astype(dtype)
  found = {name: kernel(name).transpose(1, 2, 0) for name in names}
  return found | {"out": kernel("out")}


class Measured:
  """Drops heads from an attention that computes all."""

  def __init__(self, one: Any, resid: Array, x: Array):
    self._one, self._rule = one, one.plan.heads
    self._chosen: Any = None
    if self._rule.chosen_by == "predicted":
      self._chosen = self._keep(self._rule.scores(one.arrays, resid))
    elif self._rule.chosen_by == "random":
      shape = (*x.shape[:2], one.config.num_heads)
      self._chosen = self._keep(self._rule.drawn(shape, one.layer))

  def _keep(self, scores: Float[Array, "B T N"]) -> Bool[Array, "B T N"]:
    kept = self._rule.keep(scores, self._one.arrays)
    return kept | self._one.is_prompt[..., None]

  def product(self, next_fun, module, x):
    """Masks keys and values by the rule, and the heads' outputs."""
    if module.name in ("key", "value") and self._rule.missing_kv == "zero":
      kept = unit_rules.kv_heads(self._chosen, self._one.config.num_kv_heads)
      return jnp.where(kept[..., None], next_fun(x), 0)
    if module.name != "out":
      return next_fun(x)
    kernel = module.variables["params"]["kernel"]
    strengths = sparsity_labels.head_strengths(x, kernel, self._one.plan.label)
    chosen = self._chosen
    chosen = self._keep(strengths) if chosen is None else chosen
    masked = jnp.where(chosen[..., None], x, 0)
    if module.is_mutable_collection(COLLECTION):
      self._sow(module, x, masked, strengths, chosen, kernel)
    return next_fun(masked)

  def _sow(self, module, x, masked, strengths, chosen, kernel) -> None:
    one, num_heads = self._one, strengths.shape[-1]
    num = one.plan.num_positive_heads or self._rule.number(one.arrays)
    num = num_heads if num is None else num
    positive = sparsity_labels.keep_top(strengths, num)
    read = lambda heads: jnp.einsum("BTNH,NHD->BTD", heads, kernel)
    counted = ~one.is_prompt & (one.positions >= 0)
    sums = sparsity_metrics.count(
        chosen, positive, strengths, read(masked), read(x), counted
    )
    module.sow(COLLECTION, "heads", sums)
    kept = unit_rules.kv_heads(chosen, one.config.num_kv_heads)
    kept = (kept & counted[..., None]).sum(dtype=jnp.float32)
    module.sow(COLLECTION, "kv_heads", kept / one.config.num_kv_heads)


class Decoded:
  """Computes the chosen heads of one token of each sequence."""

  def __init__(self, one: Any, resid: Float[Array, "B 1 D"], cache: Any):
    self._one, self._rule, self._cache = one, one.plan.heads, cache
    num_heads = one.config.num_heads
    if self._rule.chosen_by == "random":
      scores = self._rule.drawn((resid.shape[0], num_heads), one.layer)
    else:
      scores = self._rule.scores(one.arrays, resid[:, 0])
    self.chosen = self._rule.keep(scores, one.arrays)
    self._num = self._rule.num or num_heads
    self._ids, self._valid = _list(self.chosen, self._num)
    kept = unit_rules.kv_heads(self.chosen, one.config.num_kv_heads)
    self._kv = kept
    if isinstance(cache, lazy_kv.LazyKV):
      self._kv = kept | cache.is_flush
    elif self._rule.missing_kv == "recompute":
      raise errors.UserError(
          "missing_kv=recompute wants the caches of `init_cache`, which keep"
          f" inputs; got a {type(cache).__name__}."
      )

  def cache(self, x: Float[Array, "B 1 D"]) -> Any:
    """The cache, told what is computed for this token."""
    if isinstance(self._cache, lazy_kv.LazyKV):
      return self._cache.with_step(x[:, 0], self._kv)
    return self._cache

  def product(self, next_fun, module, x):
    """Projects into and out of what is chosen."""
    is_dense = self._num == self._one.config.num_heads
    if module.name in ("key", "value"):
      return self._key_or_value(next_fun, module, x)
    if is_dense and self._rule.num is not None:
      return next_fun(x)
    return self._out(module, x) if module.name == "out" else self._in(module, x)

  def _in(self, module, x) -> Float[Array, "B 1 N H"]:
    kernel = self._one.arrays["attn"]["query"]
    found = gather_heads.project_in(
        x[:, 0].astype(kernel.dtype), kernel, self._ids, num_valid=self._valid
    )
    query = _scatter(found, self._ids, kernel.shape[0])[:, None]
    return _plus_bias(query, module, self.chosen)

  def _out(self, module, x) -> Float[Array, "B 1 D"]:
    kernel = self._one.arrays["attn"]["out"]
    some = jnp.take_along_axis(x[:, 0], self._ids[..., None], axis=1)
    out = gather_heads.project_out(
        some.astype(kernel.dtype), kernel, self._ids, num_valid=self._valid
    )[:, None]
    bias = module.variables["params"].get("bias")
    return out if bias is None else out + bias.astype(out.dtype)[None, None]

  def _key_or_value(self, next_fun, module, x) -> Float[Array, "B _ K H"]:
    rule = self._rule.missing_kv
    if rule == "always_compute_kv":
      return next_fun(x)
    kernel = self._one.arrays["attn"][module.name]
    x = x.astype(kernel.dtype)
    if rule == "zero":
      return self._some(module, x, kernel)
    # Kept inputs first, then the new one: the cache knows which are missing.
    x = jnp.concatenate([self._cache.x.astype(x.dtype), x], axis=1)
    return jax.lax.cond(
        self._cache.is_flush[0, 0],
        lambda: _plus_bias(_project(x, kernel), module, self._kv),
        lambda: self._some(module, x, kernel),
    )

  def _some(self, module, x, kernel) -> Float[Array, "B _ K H"]:
    """Keys or values of the chosen KV heads, 0 of the others."""
    batch, num_tokens = x.shape[:2]
    num_kv_heads = kernel.shape[0]
    ids, valid = _list(self._kv, min(self._num, num_kv_heads))
    many = lambda y: jnp.repeat(y, num_tokens, axis=0)
    found = gather_heads.project_in(
        x.reshape(batch * num_tokens, -1),
        kernel,
        many(ids),
        num_valid=many(valid),
    )
    found = _scatter(found, many(ids), num_kv_heads)
    found = found.reshape(batch, num_tokens, *found.shape[1:])
    return _plus_bias(found, module, self._kv)


def _project(x: Float[Array, "B T D"], kernel: Float[Array, "K H D"]) -> Array:
  return jnp.einsum("BTD,KHD->BTKH", x, kernel)


def _list(chosen: Bool[Array, "B N"], num: int):
  scores = jnp.where(chosen, 1.0, -jnp.inf)
  return selection.top_blocks(scores, num)


def _scatter(found, ids, num_heads: int):
  """[B, S, H] to [B, N, H]; what is past the list's number is 0 already."""
  batch = found.shape[0]
  shape = (batch, num_heads, found.shape[-1])
  return (
      jnp.zeros(shape, found.dtype)
      .at[jnp.arange(batch)[:, None], ids]
      .set(found)
  )


def _plus_bias(found, module, chosen: Bool[Array, "B N"]):
  """Adds the bias of chosen heads to [B, T, N, H]."""
  bias = module.variables["params"].get("bias")
  if bias is None:
    return found
  bias = bias.astype(found.dtype)[None, None]
  return found + jnp.where(chosen[:, None, :, None], bias, 0)
