"""The MLP of a `SparseTransformer`: measured, read in at prefill, decoded.

Letters: B batch, T tokens, D width, F neurons, U blocks, S chosen blocks.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from joma.inference.sparsity import plan as plan_lib
from joma.inference.sparsity import sparsity_labels
from joma.inference.sparsity import sparsity_metrics
from joma.inference.sparsity import unit_rules
from joma.transformer import config as configs
from joma.transformer import mlp
from kernels_pallas import activations
from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import selection
from scansnap_jax.experiment import errors

COLLECTION = "sparsity"


def rows(
    params: Mapping[str, Any], dtype: jax.typing.DTypeLike
) -> dict[str, Array]:
  """The matrices of an MLP with a row a neuron."""
  kernel = lambda name: params[name]["kernel"].astype(dtype)
  found = {"up": kernel("up").T, "down": kernel("down")}
  return found | ({"gate": kernel("gate").T} if "gate" in params else {})


def check_decodes(rule: unit_rules.UnitRule) -> None:
  """Raises UserError if a rule has to compute neurons to choose them."""
  decoding = (unit_rules.Predicted, unit_rules.Griffin, unit_rules.Random)
  if not isinstance(rule, decoding):
    raise errors.UserError(
        f"{type(rule).__name__} chooses neurons that it has computed: it can be"
        " measured, not decoded with."
    )


def dense_update(
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

  def __init__(
      self, call: plan_lib.PlanCall, x: Float[Array, "B T D"], resid: Array
  ):
    self._call, self._x, self._resid = call, x, resid
    self._hidden_pre: Float[Array, "B T F"] | None = None
    self._choice: tuple[Array, Array, Array] | None = None
    self._inputs: Bool[Array, "B T D"] | None = None

  def masked_inputs(self) -> Float[Array, "B T D"]:
    """What the MLP is given."""
    call = self._call
    kept = call.plan.mlp.keep_inputs(self._x, call.arrays)
    if kept is None:
      return self._x
    kept = kept | call.is_prompt[..., None]
    self._inputs = kept
    return jnp.where(kept, self._x, 0)

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Notes what the activation reads, masks what W_down reads."""
    if dense.name != "down":
      is_pre = dense.name == "gate" or not self._call.config.use_gated_mlp
      out = dense(x)
      self._hidden_pre = out if is_pre else self._hidden_pre
      return out
    kernel = dense.variables["params"]["kernel"]
    chosen = self._choose(x, kernel)
    return dense(jnp.where(chosen, x, 0))

  def _choose(
      self, hidden: Float[Array, "B T F"], kernel: Float[Array, "F D"]
  ) -> Bool[Array, "B T F"]:
    call, plan, hidden_pre = self._call, self._call.plan, self._hidden_pre
    assert hidden_pre is not None  # W_down is read after what it reads of.
    strengths = sparsity_labels.unit_strengths(
        hidden_pre, hidden, kernel, plan.label, plan.block_size
    )
    activation = activations.ACTIVATIONS[call.config.activation](hidden_pre)
    view = unit_rules.View(
        resid=self._resid,
        hidden_pre=hidden_pre,
        hidden=hidden,
        strengths=strengths,
        activation=activation,
        is_prompt=call.is_prompt,
        arrays=call.arrays,
        layer=call.layer,
        block_size=plan.block_size,
    )
    num = plan.num_positive or plan.mlp.number(call.arrays)
    num = strengths.shape[-1] if num is None else num
    positive = sparsity_labels.positives(strengths, plan.label, num)
    expand = lambda units: jnp.repeat(
        units, hidden.shape[-1] // units.shape[-1], axis=-1
    )
    chosen = expand(plan.mlp.keep(view)) | call.is_prompt[..., None]
    self._choice = chosen, expand(positive), jnp.abs(hidden)
    return chosen

  def sow(self, apply_mlp: mlp.Mlp, update: Float[Array, "B T D"]) -> None:
    """Sows the sums, and how many entries of x were read."""
    if not apply_mlp.is_mutable_collection(COLLECTION):
      return
    call = self._call
    counted = ~call.is_prompt & (call.positions >= 0)
    dense = dense_update(call.config, apply_mlp.variables["params"], self._x)
    assert self._choice is not None  # The MLP has been computed.
    chosen, positive, mass = self._choice
    sums = sparsity_metrics.count(
        chosen, positive, mass, update, dense, counted
    )
    apply_mlp.sow(COLLECTION, "mlp", sums)
    read = (
        jnp.ones_like(self._x, bool) if self._inputs is None else self._inputs
    )
    read = (read & counted[..., None]).sum(dtype=jnp.float32)
    apply_mlp.sow(COLLECTION, "inputs", read / self._x.shape[-1])


class Prefilled:
  """Lets Griffin choose its blocks from the prompt; changes nothing.

  Attributes:
    block_ids: The blocks of each text [B, S], once its prompt has been read;
      None where the plan is not Griffin's.
  """

  def __init__(
      self, call: plan_lib.PlanCall, block_ids: Int[Array, "B S"] | None
  ):
    self._call = call
    self.block_ids = block_ids

  def product(self, dense: nn.Module, x: Array) -> Array:
    """Looks at what W_down reads."""
    call, rule = self._call, self._call.plan.mlp
    if dense.name == "down" and self.block_ids is not None:
      found = rule.scores(x, call.positions >= 0, call.plan.block_size)
      num = self.block_ids.shape[-1]
      self.block_ids, _ = selection.top_blocks(found, num)
    return dense(x)


def decode(
    call: plan_lib.PlanCall,
    apply_mlp: mlp.Mlp,
    x: Float[Array, "B 1 D"],
    resid: Float[Array, "B 1 D"],
    block_ids: Int[Array, "B S"] | None,
) -> Float[Array, "B 1 D"]:
  """Computes the chosen blocks of one token of each sequence.

  Args:
    call: Of the layer.
    apply_mlp: The layer's MLP.
    x: What it reads.
    resid: What the rule chooses by.
    block_ids: What was chosen for the whole text, if it was.
  """
  num_units = call.config.hidden_dim // call.plan.block_size
  rule = call.plan.mlp
  # All blocks: there is nothing to gather.
  if rule.num == num_units:
    return apply_mlp(x)
  num_valid = None
  if block_ids is None:
    block_ids, num_valid = _choose(call, resid[:, 0], num_units)
  params, weights = apply_mlp.variables["params"], call.arrays["weights"]
  bias = lambda name: params.get(name, {}).get("bias")
  x = x.astype(call.dtype)
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
      activation=call.config.activation,
      block_size=call.plan.block_size,
  )
  return update[:, None]


def _choose(
    call: plan_lib.PlanCall, resid: Float[Array, "B D"], num_units: int
) -> tuple[Int[Array, "*B S"], Int[Array, "*B"]]:
  """Returns the blocks of a token of each sequence, and how many count."""
  rule, plan = call.plan.mlp, call.plan
  if isinstance(rule, unit_rules.Random) and rule.num is not None:
    key = jax.random.fold_in(jax.random.key(rule.seed), call.layer)
    key = jax.random.fold_in(key, call.positions.max())
    found = jax.random.uniform(key, (resid.shape[0], num_units))
  elif isinstance(rule, unit_rules.Random):
    raise errors.UserError("Random decodes with a number of blocks: give num.")
  else:
    found = rule.scores(call.arrays, resid)
  # One choice for the batch reads its weights once; by the largest score, so
  # that no sequence loses what it wants most.
  found = found.max(axis=0) if plan.is_shared else found
  if rule.num is not None:
    return selection.top_blocks(found, rule.num)
  if "mlp_threshold" not in call.arrays or "num_blocks" in call.arrays:
    raise errors.UserError(
        f"{type(rule).__name__} decodes with a number of blocks, or with"
        " calibrated thresholds: give num, or thresholds to `prepare`."
    )
  return selection.threshold_blocks(found, 0.0, num_units)
