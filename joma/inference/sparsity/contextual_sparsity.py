"""A Transformer that computes chosen neurons and heads alone.

`SparseTransformer` is a `Transformer` with a plan; its modules are intercepted,
never changed. What the plan's rules have learned lies in the parameters, below
`sparse`, where `prepare` puts it. It reads texts in three ways:

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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from joma.inference.sparsity import contextual_config
from joma.inference.sparsity import lazy_kv
from joma.inference.sparsity import predictors as predictors_lib
from joma.inference.sparsity import sparse_heads
from joma.inference.sparsity import sparse_mlp
from joma.inference.sparsity import unit_rules
from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer import model as models
from joma.transformer import norm
from scansnap_jax.experiment import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityPlan:
  """What is left out; static.

  Attributes:
    mlp: Rule of the neurons; None computes all.
    heads: Rule of the heads; None computes all.
    block_size: Neurons of a block.
    lookahead: As in `predictors.PredictorConfig`.
    is_shared: Whether the sequences of a batch share one list of blocks when
      they decode, that of the highest scores among them.
    prompt_len: Tokens of each text that are dense when measured.
    label: Which neurons count, for measures.
    num_positive: How many blocks count, unless `label` is sign; None is as many
      as the rule chooses, or all.
    num_positive_heads: How many heads count; None is likewise.
  """

  mlp: Any = None
  heads: unit_rules.HeadRule | None = None
  block_size: int = 1
  lookahead: int = 0
  is_shared: bool = False
  prompt_len: int = 0
  label: contextual_config.Label = "contribution"
  num_positive: int | None = None
  num_positive_heads: int | None = None


class SparseTransformer(models.Transformer):
  """A Transformer that follows a plan.

  Attributes:
    plan: What it leaves out.
  """

  plan: SparsityPlan = SparsityPlan()

  def __call__(
      self, tokens: Int[Array, "B T"], *, kv_cache: Any = None, **options: Any
  ) -> Any:
    """As `Transformer`; a cache is one of `init_cache`'s."""
    check(self.config, self.plan, is_measured=kv_cache is None)
    arrays = self.variables["params"].get("sparse", {})
    one = _Pass(self, arrays, tokens, options.get("positions"), kv_cache)
    with nn.intercept_methods(one.intercept):
      return super().__call__(tokens, kv_cache=kv_cache, **options)


def prepare(
    config: configs.TransformerConfig,
    params: Mapping[str, Any],
    *,
    predictors: Any = None,
    thresholds: Mapping[str, Array] | None = None,
    calibrated: Mapping[str, Float[Array, "L"]] | None = None,
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
    cache: An `attention.KVCache`.
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
  ids = jnp.broadcast_to(jnp.arange(num)[None], (batch, num))
  return tuple(LayerState(cache, ids) for cache in kv_cache)


def check(
    config: configs.TransformerConfig, plan: SparsityPlan, is_measured: bool
) -> None:
  """Raises UserError if a plan does not fit a model, or cannot decode."""
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


class _Pass:
  """One forward pass: what is known by the time a module is called."""

  def __init__(self, model, arrays, tokens, positions, kv_cache):
    self.config, self.plan, self.dtype = model.config, model.plan, model.dtype
    self._all_arrays = arrays
    steps = jnp.arange(tokens.shape[1])[None]
    if positions is None:
      positions = jnp.broadcast_to(steps, tokens.shape)
    self.positions = positions
    self.is_decoding = kv_cache is not None and tokens.shape[1] == 1
    self.is_measuring = kv_cache is None
    self.is_prompt = (positions < self.plan.prompt_len) & (positions >= 0)
    # Of the layer at hand.
    self.layer, self.arrays = -1, {}
    self.layer_in: Any = None
    self.layer_before: Any = None
    self.mlp_in: Any = None
    self.block_ids: Any = None
    self.heads: Any = None
    self.neurons: Any = None

  def intercept(self, next_fun, args, kwargs, context):
    """Calls a module's method, or what takes its place."""
    module = context.module
    if context.method_name != "__call__":
      return next_fun(*args, **kwargs)
    if isinstance(module, models.Layer):
      return self._layer(next_fun, module, *args, **kwargs)
    if isinstance(module, attention.Attention) and self.plan.heads is not None:
      return self._attention(next_fun, module, *args, **kwargs)
    if isinstance(module, norm.Norm) and module.name == "mlp_norm":
      self.mlp_in = args[0]
    if isinstance(module, mlp.Mlp) and self.plan.mlp is not None:
      return self._mlp(next_fun, module, *args, **kwargs)
    if isinstance(module, (nn.Dense, nn.DenseGeneral)):
      inside = self.heads if "attn" in module.path else self.neurons
      if inside is not None and self.layer >= 0:
        return inside.product(next_fun, module, *args)
    return next_fun(*args, **kwargs)

  def _layer(self, next_fun, module, x, positions, mask, cache, *rest):
    self.layer_before = x if self.layer < 0 else self.layer_in
    self.layer, self.layer_in, self.mlp_in = self.layer + 1, x, None
    self.arrays = self._all_arrays.get(f"layers_{self.layer}", {})
    self.heads = self.neurons = None
    state = cache
    if isinstance(state, LayerState):
      self.block_ids, cache = state.block_ids, state.cache
    out, cache, carry = next_fun(x, positions, mask, cache, *rest)
    self.heads = self.neurons = None
    if isinstance(state, LayerState):
      cache = LayerState(cache, self.block_ids)
    return out, cache, carry

  def _attention(self, next_fun, module, x, positions, mask, cache, *rest):
    resid = self.layer_before if self.plan.lookahead else self.layer_in
    if self.is_measuring:
      self.heads = sparse_heads.Measured(self, resid, x)
    elif self.is_decoding:
      self.heads = sparse_heads.Decoded(self, resid, cache)
      cache = self.heads.cache(x)
    out = next_fun(x, positions, mask, cache, *rest)
    self.heads = None
    return out

  def _mlp(self, next_fun, module, x, *rest):
    # Without a norm before the MLP, it reads the stream itself.
    resid = x if self.config.norm_placement == "post" else self.mlp_in
    if self.plan.lookahead or self.config.use_parallel_residual:
      resid = self.layer_in
    if self.is_decoding:
      return sparse_mlp.decode(self, next_fun, module, x, resid, *rest)
    if self.is_measuring:
      self.neurons = sparse_mlp.Measured(self, x, resid)
      update = next_fun(self.neurons.masked_inputs(), *rest)
      self.neurons.sow(module, update)
    else:
      self.neurons = sparse_mlp.Prefilled(self)
      update = next_fun(x, *rest)
    self.neurons = None
    return update
