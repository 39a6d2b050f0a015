"""A Transformer that computes chosen neurons and heads alone.

`SparseTransformer` is a `Transformer` with a plan, which it hands to its layers
as a router (`transformer.routing.Router`). What the plan's rules have learned
lies in the parameters, below `sparse`, where `prepare` puts it. It reads texts
in three ways:

  measure   without a cache: all is computed, then what was not chosen is
            dropped, from token `prompt_len` on. Sums of `sparsity_metrics` are
            sown under "sparsity".
  prefill   with a cache, several tokens: the dense model. Griffin chooses here.
  decode    with a cache, one token: the chosen blocks and heads alone are read,
            through `kernels_pallas.gather_mlp`.

The first equals the two others, token by token: Deja Vu
(https://arxiv.org/abs/2310.17157) can be measured on whole texts at once.

Letters: B batch, T tokens, D width, F neurons, U blocks, N heads, K KV heads, H
size of a head, S chosen ones.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.inference.sparsity import lazy_kv
from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import predictors as predictors_lib
from joma.inference.sparsity import sparse_heads
from joma.inference.sparsity import sparse_mlp
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer import model as models
from scansnap_jax.experiment import errors


class SparseTransformer(models.Transformer):
  """A Transformer that follows a plan.

  Attributes:
    plan: What it leaves out.
  """

  plan: plan_lib.SparsityPlan = plan_lib.SparsityPlan()

  def __call__(
      self, tokens: Int[Array, "B T"], *, kv_cache: Any = None, **options: Any
  ) -> Any:
    """As `Transformer`; a cache is one of `init_cache`'s."""
    check(self.config, self.plan, is_measured=kv_cache is None)
    router = PlanRouter(
        arrays=self.variables["params"].get("sparse", {}),
        config=self.config,
        plan=self.plan,
        dtype=self.dtype,
    )
    return super().__call__(tokens, kv_cache=kv_cache, router=router, **options)


def prepare(
    config: configs.TransformerConfig,
    params: Mapping[str, Any],
    *,
    predictors: Any = None,
    thresholds: Mapping[str, Array] | None = None,
    calibrated: Mapping[str, Num[Any, "L"]] | None = None,
    dtype: Any = jnp.float32,
    to_decode: bool = True,
) -> dict[str, Any]:
  """Puts what rules need among a model's parameters, below `sparse`.

  Args:
    config: The model's.
    params: The model's.
    predictors: Of `Predicted` and of heads, see `predictors`.
    thresholds: Of `predictor_training.calibrate`.
    calibrated: Further numbers of each layer by name, such as those of
      `training_free.calibrate` for one share.
    dtype: Of the model's products.
    to_decode: Whether to add the weights as decoding reads them, a row a
      neuron and a matrix a head: a second copy of `up`, `gate` and `query`.
  """
  sparse = {}
  for layer in range(config.num_layers):
    name = f"layers_{layer}"
    arrays: dict[str, Any] = {}
    if predictors is not None:
      arrays |= predictors_lib.layer(dict(predictors), layer)
    for kind, values in (thresholds or {}).items():
      arrays[f"{kind}_threshold"] = values[layer]
    for key, values in (calibrated or {}).items():
      arrays[key] = values[layer]
    if to_decode:
      arrays["weights"] = sparse_mlp.rows(params[name]["mlp"], dtype)
      arrays["attn"] = sparse_heads.matrices(params[name]["attn"], dtype)
    sparse[name] = arrays
  return {**params, "sparse": sparse}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
  """A layer's cache and the blocks that were chosen for a whole text.

  Attributes:
    cache: A `hooks.KVCache`.
    block_ids: [B, S].
  """

  cache: Any
  block_ids: Any


def init_cache(model: SparseTransformer, kv_cache: tuple[Any, ...]) -> Any:
  """Wraps empty caches in what the plan carries from step to step.

  Raises:
    UserError: If heads are recomputed and a cache is no `FullCache`.
  """
  plan = model.plan
  if plan.heads is not None and plan.heads.missing_kv == "recompute":
    kv_cache = tuple(
        lazy_kv.init(cache, plan.heads.period, model.config.embed_dim)
        for cache in kv_cache
    )
  if not isinstance(plan.mlp, unit_rules.Griffin):
    return kv_cache
  num = plan.mlp.num
  if num is None:
    raise errors.UserError("Griffin decodes with a number of blocks: give num.")
  batch = jax.tree.leaves(kv_cache[0])[0].shape[0]
  # Any blocks, for their shape: the prompt chooses.
  ids = jnp.broadcast_to(jnp.arange(num)[None], (batch, num))
  return tuple(LayerState(cache, ids) for cache in kv_cache)


def check(
    config: configs.TransformerConfig,
    plan: plan_lib.SparsityPlan,
    is_measured: bool,
) -> None:
  """Raises UserError if a plan does not fit a model, or cannot decode."""
  configs.require_dense(config, "Contextual sparsity")
  if plan.block_size < 1 or config.hidden_dim % plan.block_size:
    raise errors.UserError(
        f"block_size={plan.block_size} must divide the {config.hidden_dim}"
        " neurons of a layer."
    )
  num_units = config.hidden_dim // plan.block_size
  for name, rule, most in (
      ("blocks", plan.mlp, num_units),
      ("heads", plan.heads, config.num_heads),
  ):
    num = getattr(rule, "num", None)
    if num is not None and not 1 <= num <= most:
      raise errors.UserError(
          f"{num} {name} of a layer cannot be chosen: there are {most}."
      )
  if plan.heads is not None:
    if plan.heads.missing_kv not in unit_rules.MISSING_KV:
      raise errors.UserError(
          f"missing_kv={plan.heads.missing_kv} is none of"
          f" {', '.join(unit_rules.MISSING_KV)}."
      )
    by_oracle = plan.heads.chosen_by == "oracle"
    if by_oracle and plan.heads.missing_kv != "always_compute_kv":
      raise errors.UserError(
          "Heads chosen by what they return need their keys and values first:"
          " an oracle goes with missing_kv=always_compute_kv."
      )
    if by_oracle and not is_measured:
      raise errors.UserError("An oracle of heads can be measured, not decoded.")
  if not is_measured and plan.mlp is not None:
    sparse_mlp.check_decodes(plan.mlp)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("arrays",),
    meta_fields=("config", "plan", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRouter:
  """Leaves out, in each layer, what a plan says; a `routing.Router`.

  Attributes:
    arrays: What rules have learned, by layer: what `prepare` puts below
      `sparse`.
    config: The model's.
    plan: What is left out.
    dtype: Of the model's products.
  """

  arrays: Mapping[str, Any]
  config: configs.TransformerConfig
  plan: plan_lib.SparsityPlan
  dtype: Any

  def route(
      self,
      layer: int,
      x: Float[Array, "B T D"],
      x_before: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      kv_cache: Any,
  ) -> "PlanRoute":
    """Returns the way through a layer; see `routing.Router`."""
    call = plan_lib.PlanCall(
        config=self.config,
        plan=self.plan,
        dtype=self.dtype,
        layer=layer,
        arrays=self.arrays.get(f"layers_{layer}", {}),
        positions=positions,
        is_prompt=(positions < self.plan.prompt_len) & (positions >= 0),
    )
    return PlanRoute(
        call,
        layer_in=x,
        layer_before=x_before,
        is_measuring=kv_cache is None,
    )


class PlanRoute:
  """One call of one layer under a plan; a `routing.Route`.

  It notes what one product tells about the next: which heads are chosen before
  they are projected, and which blocks Griffin takes for the rest of a text.
  """

  def __init__(
      self,
      call: plan_lib.PlanCall,
      *,
      layer_in: Float[Array, "B T D"],
      layer_before: Float[Array, "B T D"],
      is_measuring: bool,
  ):
    """Starts the call of a layer.

    Args:
      call: What the rules see.
      layer_in: The residual stream that the layer reads.
      layer_before: What the layer before it read.
      is_measuring: Whether all is computed, and there is no cache.
    """
    self._call, self._plan = call, call.plan
    self._layer_in, self._layer_before = layer_in, layer_before
    self._is_measuring = is_measuring
    self._is_decoding = not is_measuring and call.positions.shape[1] == 1
    self._block_ids: Int[Array, "B S"] | None = None
    self._heads: sparse_heads.Measured | sparse_heads.Decoded | None = None

  def heads(self, attn_in: Float[Array, "B T D"], kv_cache: Any) -> Any:
    """Chooses the heads; returns the cache that attention works with."""
    if isinstance(kv_cache, LayerState):
      self._block_ids = kv_cache.block_ids
      kv_cache = kv_cache.cache
    rule = self._plan.heads
    if rule is None:
      return kv_cache
    # One layer ahead, a choice can be made while the layer before computes.
    resid = self._layer_before if self._plan.lookahead else self._layer_in
    if self._is_measuring:
      self._heads = sparse_heads.Measured(self._call, rule, resid, attn_in)
    elif self._is_decoding:
      self._heads = sparse_heads.Decoded(self._call, rule, resid, kv_cache)
      return self._heads.cache(attn_in)
    return kv_cache

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Projects into or out of heads, of the chosen ones where some are."""
    return dense(x) if self._heads is None else self._heads.product(dense, x)

  def mlp(
      self,
      apply_mlp: mlp.Mlp,
      mlp_in: Float[Array, "B T D"],
      resid: Float[Array, "B T D"],
  ) -> Float[Array, "B T D"]:
    """Computes the chosen neurons, or drops the others from all of them."""
    if self._plan.mlp is None:
      return apply_mlp(mlp_in)
    # Blocks ahead of time are chosen by what was there before attention; so are
    # those of an MLP beside attention, which reads nothing else.
    if self._plan.lookahead or self._call.config.use_parallel_residual:
      resid = self._layer_in
    if self._is_decoding:
      return sparse_mlp.decode(
          self._call, apply_mlp, mlp_in, resid, self._block_ids
      )
    if not self._is_measuring:
      prompt = sparse_mlp.Prefilled(self._call, self._block_ids)
      update = apply_mlp(mlp_in, product=prompt.product)
      self._block_ids = prompt.block_ids
      return update
    # All is computed, then dropped: one pass measures every token of a text.
    neurons = sparse_mlp.Measured(self._call, mlp_in, resid)
    update = apply_mlp(neurons.masked_inputs(), product=neurons.product)
    neurons.sow(apply_mlp, update)
    return update

  def new_cache(self, kv_cache: Any) -> Any:
    """Adds the blocks of the text to the cache, where the plan has some."""
    if self._block_ids is None:
      return kv_cache
    return LayerState(kv_cache, self._block_ids)
