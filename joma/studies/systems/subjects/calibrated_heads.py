"""A checkpoint some of whose heads are calibrated, for the study `act`.

Heads, theta and beta are arrays, so that one program tries every head. The rows
are written out: what `Act` does in one pass is done here by its definition.
Columns are those of a text's prompt, and the loss is of what follows, which
they know nothing of.

Letters: B texts, T tokens, S keys, L layers, N heads, H head size, D width.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from joma.studies import once
from joma.systems.score_rules.calibrated import columns as columns_lib
from joma.transformer import config as configs
from joma.transformer import hooks
from joma.transformer import model as models
from joma.transformer import routing
from joma.transformer.layers import cross_entropy
from joma.transformer.rope import rotary
from joma.transformer.weighing import rows
from kernels_pallas import masks
from scansnap_jax.experiment import errors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Which heads are calibrated, and how: a `routing.Router`.

  Attributes:
    is_head: Which.
    theta: Mean weight above which a column is in S.
    beta: What its weights are multiplied by.
    num_prompt: Tokens whose rows choose columns, static.
    shape: The model's, static.
  """

  is_head: Bool[Array, "L N"]
  theta: Float[Array, ""]
  beta: Float[Array, ""]
  num_prompt: int = dataclasses.field(metadata={"static": True})
  shape: configs.TransformerConfig = dataclasses.field(
      metadata={"static": True}
  )

  def route(
      self,
      layer: int,
      x: Float[Array, "B T D"],
      x_before: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      kv_cache: PyTree,
  ) -> "_Calibrated":
    """As in `routing.Router`."""
    del x, x_before, kv_cache
    return _Calibrated(self, layer, positions)


class _Calibrated(routing.Products):
  """One layer: a `routing.Route` that notes queries, keys and values."""

  def __init__(
      self, how: Calibration, layer: int, positions: Int[Array, "B T"]
  ):
    self._how, self._layer, self._positions = how, layer, positions
    self._notes: dict[str, Array] = {}

  def product(self, dense: nn.Module, x: Array) -> Array:
    if dense.name == "out":
      chosen = self._how.is_head[self._layer][None, None, :, None]
      x = jnp.where(chosen, self._calibrated(x), x)
      return dense(x)  # type: ignore[not-callable]
    self._notes[str(dense.name)] = dense(x)  # type: ignore[not-callable]
    return self._notes[str(dense.name)]

  def _calibrated(self, out: Float[Array, "B T N H"]) -> Array:
    how, value = self._how, self._notes["value"]
    weights = self._weights()
    is_sink = columns(weights, how.theta, how.num_prompt)
    of_sinks = jnp.where(is_sink[:, :, None], weights, 0.0)
    groups = weights.shape[1] // value.shape[2]
    value = jnp.repeat(value, groups, axis=2)
    part = jnp.einsum("BNTS,BSNH->BTNH", of_sinks, value)
    mass = of_sinks.sum(axis=-1).swapaxes(1, 2)
    return columns_lib.calibrate(out, part, mass, how.beta)

  def _weights(self) -> Float[Array, "B N T S"]:
    shape, places = self._how.shape, self._positions
    query, key = self._notes["query"], self._notes["key"]
    if shape.positions == "rotary":
      kind = shape.rope_of(self._layer)
      query, key = (
          rotary.rotate_by(each, places, kind, shape) for each in (query, key)
      )
    scale = shape.attn_scale
    options = hooks.AttentionOptions(
        scale=shape.head_dim**-0.5 if scale is None else scale,
        logits_soft_cap=shape.attn_logits_soft_cap,
    )
    causal = masks.causal(query.shape[1])
    return jax.nn.softmax(
        rows.masked_logits(query, key, causal, options, (places, places))
    )


def columns(
    weights: Float[Array, "B N T S"], theta: Float[Array, ""], num_prompt: int
) -> Bool[Array, "B N S"]:
  """S: columns behind the first whose mean weight in prompts is above theta."""
  mean = weights[:, :, :num_prompt].mean(axis=2)
  return (mean > theta).at[..., 0].set(False)


class Calibrated:
  """Losses of a model whose heads are calibrated; one program for all.

  Args:
    model: Without systems of its own.
    params: Its parameters.
    num_prompt: Tokens of a text that choose columns and have no loss.

  Raises:
    UserError: If queries are normalized, or layers have windows or systems:
      what the projections say is then not what attention reads.
  """

  def __init__(
      self, model: models.Transformer, params: PyTree, num_prompt: int
  ):
    shape = model.config
    windows = [shape.window_of(layer) for layer in range(shape.num_layers)]
    if shape.use_qk_norm or any(windows) or shape.attention:
      raise errors.UserError(
          "This study reads checkpoints of plain attention, without windows,"
          " attention systems and norms of queries."
      )
    self.shape, self.num_prompt = shape, num_prompt
    self._params = params
    self._run: Callable[..., Array] = once.jit(
        lambda params, tokens, how: _losses(model, params, tokens, how)
    )
    self._look: Callable[..., Array] = once.jit(
        lambda params, tokens, theta: _counts(
            model, params, tokens, theta, num_prompt
        )
    )

  def losses(
      self,
      tokens: Int[Array, "B T"],
      is_head: Bool[np.ndarray, "L N"],
      theta: float,
      beta: float,
  ) -> Float[np.ndarray, "B"]:
    """Mean loss of what follows the prompt, of each text by itself."""
    how = Calibration(
        is_head=jnp.asarray(is_head),
        theta=jnp.float32(theta),
        beta=jnp.float32(beta),
        num_prompt=self.num_prompt,
        shape=self.shape,
    )
    # One program, however many texts there are.
    run = lambda text: float(self._run(self._params, text[None], how)[0])
    return np.array([run(text) for text in tokens])

  def num_columns(
      self, tokens: Int[Array, "B T"], theta: float
  ) -> Int[np.ndarray, "L N"]:
    """Columns in S of each head, summed over texts."""
    return np.asarray(self._look(self._params, tokens, jnp.float32(theta)))


def _losses(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    how: Calibration,
) -> Float[Array, "B"]:
  logits = model.apply({"params": params}, tokens[:, :-1], router=how)
  losses = cross_entropy.token_losses(logits, tokens[:, 1:])
  return losses[:, how.num_prompt :].mean(axis=1)


def _counts(
    model: models.Transformer,
    params: PyTree,
    tokens: Int[Array, "B T"],
    theta: Float[Array, ""],
    num_prompt: int,
) -> Int[Array, "L N"]:
  seen: Mapping[str, Any] = model.apply(
      {"params": params}, tokens[:, :num_prompt], mutable="intermediates"
  )[1]["intermediates"]
  return jnp.stack([
      columns(
          seen[f"layers_{layer}"]["attn"]["attn_weights"][0], theta, num_prompt
      ).sum(axis=(0, 2))
      for layer in range(model.config.num_layers)
  ])
