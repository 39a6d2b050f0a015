"""The MLP of a `SparseTransformer`: measured, read in at prefill, decoded.

Letters: B batch, T tokens, D width, F neurons, U blocks, S chosen blocks.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity import sparsity_metrics
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from kernels_pallas import activations
from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import selection
from scansnap_jax.experiment import errors

COLLECTION = "sparsity"


def rows(params: Mapping[str, Any], dtype: Any) -> dict[str, Array]:
  """The matrices of an MLP with a row a neuron."""
  kernel = lambda name: params[name]["kernel"].astype(dtype)
  found = {"up": kernel("up").T, "down": kernel("down")}
  return found | ({"gate": kernel("gate").T} if "gate" in params else {})


def check_decodes(rule: Any) -> None:
  """Raises UserError if a rule has to compute neurons to choose them."""
  decoding = (unit_rules.Predicted, unit_rules.Griffin, unit_rules.Random)
  if not isinstance(rule, decoding):
    raise errors.UserError(
        f"{type(rule).__name__} chooses neurons that it has computed: it can be"
        " measured, not decoded with."
    )


def dense(
    config: configs.TransformerConfig,
    params: Mapping[str, Any],
    x: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
  """The MLP of all neurons, as `mlp.Mlp` computes it in float32."""
  affine = lambda x, part: x @ part["kernel"] + (
      part["bias"][None, None] if "bias" in part else 0
  )
  up = affine(x, params["up"])
  hidden = affine(x, params["gate"]) if config.use_gated_mlp else up
  hidden = activations.ACTIVATIONS[config.activation](hidden)
  hidden = hidden * up if config.use_gated_mlp else hidden
  return affine(hidden, params["down"])


class Measured:
  """Drops neurons from an MLP that computes all."""

  def __init__(self, one: Any, x: Float[Array, "B T D"], resid: Array):
    self._one, self._x, self._resid = one, x, resid
    self._hidden_pre: Any = None
    self._choice: Any = None
    self._inputs: Any = None

  def masked_inputs(self) -> Float[Array, "B T D"]:
    """What the MLP is given."""
    one = self._one
    kept = one.plan.mlp.keep_inputs(self._x, one.arrays)
    if kept is None:
      return self._x
    kept = kept | one.is_prompt[..., None]
    self._inputs = kept
    return jnp.where(kept, self._x, 0)

  def product(self, next_fun, module, x):
    """Notes what the activation reads, masks what W_down reads."""
    if module.name != "down":
      is_pre = module.name == "gate" or not self._one.config.use_gated_mlp
      out = next_fun(x)
      self._hidden_pre = out if is_pre else self._hidden_pre
      return out
    kernel = module.variables["params"]["kernel"]
    chosen = self._choose(x, kernel)
    return next_fun(jnp.where(chosen, x, 0))

  def _choose(self, hidden, kernel):
    one, plan = self._one, self._one.plan
    strengths = sparsity_labels.unit_strengths(
        self._hidden_pre, hidden, kernel, plan.label, plan.block_size
    )
    activation = activations.ACTIVATIONS[one.config.activation](
        self._hidden_pre
    )
    view = unit_rules.View(
        resid=self._resid,
        hidden_pre=self._hidden_pre,
        hidden=hidden,
        strengths=strengths,
        activation=activation,
        is_prompt=one.is_prompt,
        arrays=one.arrays,
        layer=one.layer,
        block_size=plan.block_size,
    )
    num = plan.num_positive or plan.mlp.number(one.arrays)
    num = strengths.shape[-1] if num is None else num
    positive = sparsity_labels.positives(strengths, plan.label, num)
    expand = lambda units: jnp.repeat(
        units, hidden.shape[-1] // units.shape[-1], axis=-1
    )
    chosen = expand(plan.mlp.keep(view)) | one.is_prompt[..., None]
    self._choice = chosen, expand(positive), jnp.abs(hidden)
    return chosen

  def sow(self, module, update) -> None:
    """Sows the sums, and how many entries of x were read."""
    if not module.is_mutable_collection(COLLECTION):
      return
    one = self._one
    counted = ~one.is_prompt & (one.positions >= 0)
    dense_update = dense(one.config, module.variables["params"], self._x)
    chosen, positive, mass = self._choice
    sums = sparsity_metrics.count(
        chosen, positive, mass, update, dense_update, counted
    )
    module.sow(COLLECTION, "mlp", sums)
    read = (
        jnp.ones_like(self._x, bool) if self._inputs is None else self._inputs
    )
    read = (read & counted[..., None]).sum(dtype=jnp.float32)
    module.sow(COLLECTION, "inputs", read / self._x.shape[-1])


class Prefilled:
  """Lets Griffin choose its blocks from the prompt; changes nothing."""

  def __init__(self, one: Any):
    self._one = one

  def product(self, next_fun, module, x):
    """Looks at what W_down reads."""
    one, rule = self._one, self._one.plan.mlp
    if module.name == "down" and isinstance(rule, unit_rules.Griffin):
      found = rule.scores(x, one.positions >= 0, one.plan.block_size)
      one.block_ids, _ = selection.top_blocks(found, one.block_ids.shape[-1])
    return next_fun(x)


def decode(one: Any, next_fun, module, x: Float[Array, "B 1 D"], resid, *rest):
  """Computes the chosen blocks of one token of each sequence."""
  num_units = one.config.hidden_dim // one.plan.block_size
  rule = one.plan.mlp
  if rule.num == num_units:
    return next_fun(x, *rest)
  block_ids, num_valid = _choose(one, resid[:, 0], num_units)
  params, weights = module.variables["params"], one.arrays["weights"]
  bias = lambda name: params.get(name, {}).get("bias")
  x = x.astype(one.dtype)
  update = api.gather_mlp(
      x[:, 0],
      weights["up"],
      weights["down"],
      block_ids,
      gate=weights.get("gate"),
      up_bias=bias("up"),
      gate_bias=bias("gate"),
      down_bias=bias("down"),
      num_valid=num_valid,
      activation=one.config.activation,
      block_size=one.plan.block_size,
  )
  return update[:, None]


def _choose(one: Any, resid: Float[Array, "B D"], num_units: int):
  rule, plan = one.plan.mlp, one.plan
  if isinstance(rule, unit_rules.Griffin):
    return one.block_ids, None
  if isinstance(rule, unit_rules.Random) and rule.num is not None:
    key = jax.random.fold_in(jax.random.key(rule.seed), one.layer)
    key = jax.random.fold_in(key, one.positions.max())
    found = jax.random.uniform(key, (resid.shape[0], num_units))
  elif isinstance(rule, unit_rules.Random):
    raise errors.UserError("Random decodes with a number of blocks: give num.")
  else:
    found = rule.scores(one.arrays, resid)
  found = found.max(axis=0) if plan.is_shared else found
  if rule.num is not None:
    return selection.top_blocks(found, rule.num)
  if "mlp_threshold" not in one.arrays or "num_blocks" in one.arrays:
    raise errors.UserError(
        f"{type(rule).__name__} decodes with a number of blocks, or with"
        " calibrated thresholds: give num, or thresholds to `prepare`."
    )
  return selection.threshold_blocks(found, 0.0, num_units)
