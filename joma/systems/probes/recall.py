"""Factual recall taken apart: what each head and MLP adds to the logits.

The residual stream before the output is a sum, of the embedding, of every
head's output through its rows of the output projection, and of every MLP's. The
final norm, its statistics frozen at those of the whole stream, and the output
layer are linear, so that logits are the same sum. What an MLP adds is close to
a mean of the task and a weighted sum of what the heads before it add
(https://arxiv.org/abs/2403.19521): `regress` says how close.

Letters: B texts, L layers, N heads, H head size, T tokens, D width, F hidden
width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.transformer import config as configs
from joma.transformer.layers import monarch
from scansnap_jax.experiment import errors


class Writes(NamedTuple):
  """What is added to the residual stream of one token of each text, float32.

  Attributes:
    embed: Token and position.
    heads: Each head.
    attn_bias: The output projection's bias; zeros where there is none.
    mlp: Each MLP, its bias included.
  """

  embed: Float[Array, "B D"]
  heads: Float[Array, "B L N D"]
  attn_bias: Float[Array, "L D"]
  mlp: Float[Array, "B L D"]

  def total(self) -> Float[Array, "B D"]:
    """The stream that the final norm reads."""
    bias = self.attn_bias.sum(axis=0)[None]
    heads = self.heads.sum(axis=(1, 2))
    return self.embed + heads + bias + self.mlp.sum(axis=1)


def writes(
    params: Mapping[str, Any],
    config: configs.TransformerConfig,
    seen: Mapping[str, Any],
    at: Int[Array, "B"],
) -> Writes:
  """Takes the stream of one token of each text apart.

  Args:
    params: Of a Transformer.
    config: Its shape.
    seen: What it has sown, under "intermediates".
    at: The token of each text.

  Raises:
    UserError: If a norm is put on what is added, or on the sum, of a layer;
      or if layers run in a loop.
  """
  if config.norm_placement != "pre":
    raise errors.UserError(
        "What heads and MLPs add is a sum where norms stand before them:"
        f" norm_placement is {config.norm_placement!r}, and must be 'pre'."
    )
  if config.scan_layers:
    raise errors.UserError(
        "scan_layers makes one program of all layers, and what they add is told"
        " one by one: use scanning.unrolled, and scanning.unstack of the"
        " parameters."
    )
  sown = seen["intermediates"]
  of_token = lambda x: _pick(x[0], at).astype(jnp.float32)
  heads, biases, mlps = [], [], []
  for layer in range(config.num_layers):
    own, made = params[f"layers_{layer}"], sown[f"layers_{layer}"]
    out, down = own["attn"]["out"], own["mlp"]["down"]
    head_out = of_token(made["attn"]["head_out"])
    kernel = monarch.kernel_of(out).reshape(*head_out.shape[1:], -1)
    heads.append(jnp.einsum("BNH,NHD->BND", head_out, kernel))
    biases.append(out.get("bias", jnp.zeros(config.embed_dim)))
    hidden = of_token(made["mlp"]["hidden"])
    mlp_bias = down.get("bias", jnp.zeros(config.embed_dim))
    mlps.append(hidden @ monarch.kernel_of(down) + mlp_bias[None])
  return Writes(
      embed=of_token(sown["resid_embed"]),
      heads=jnp.stack(heads, axis=1),
      attn_bias=jnp.stack(biases),
      mlp=jnp.stack(mlps, axis=1),
  )


def to_logits(
    params: Mapping[str, Any],
    config: configs.TransformerConfig,
    part: Float[Array, "B *p D"],
    total: Float[Array, "B D"],
) -> Float[Array, "B *p V"]:
  """What a part of the stream adds to the logits, the norm frozen.

  Args:
    params: Of a Transformer.
    config: Its shape.
    part: Of the stream; parts that sum to `total` have logits that sum to the
      model's less `constant`.
    total: The stream before the final norm, whose statistics are used.

  Raises:
    UserError: If the logits are no linear function of the normalized stream.
  """
  _check_linear(config)
  if config.use_final_norm:
    scale = params["final_norm"]["scale"].astype(jnp.float32)
    if config.norm == "layer_norm":
      part = part - part.mean(axis=-1, keepdims=True)
      total = total - total.mean(axis=-1, keepdims=True)
    square = jnp.square(total).mean(axis=-1)
    size = jax.lax.rsqrt(square + config.norm_epsilon)
    scale = jnp.einsum("B,D->BD", size, scale + config.norm_scale_offset)
    part = jnp.einsum("B...D,BD->B...D", part, scale)
  return jnp.einsum("...D,DV->...V", part, _output(params, config))


def constant(
    params: Mapping[str, Any], config: configs.TransformerConfig
) -> Float[Array, "V"]:
  """What biases of the final norm and the output layer add to the logits."""
  added = jnp.zeros(config.vocab_size)
  if config.use_final_norm and config.norm == "layer_norm":
    added += params["final_norm"]["bias"] @ _output(params, config)
  if config.use_output_bias and not config.tie_embeddings:
    added += params["output"]["bias"]
  return added


class Regression(NamedTuple):
  """What a weighted sum of heads and a constant make of an MLP's output.

  Attributes:
    weights: One number a head.
    bias: The constant vector, which the task alone decides.
    r2: Share of the output's variance over texts that it makes, at most 1.
  """

  weights: Float[np.ndarray, "N"]
  bias: Float[np.ndarray, "D"]
  r2: float


def regress(
    mlp: Float[np.ndarray, "B D"], heads: Float[np.ndarray, "B N D"]
) -> Regression:
  """Least squares of mlp = sum_n weights_n heads_n + bias, in float64.

  Args:
    mlp: An MLP's output on texts of one task.
    heads: Of its own layer and of those before it, N of them in all.
  """
  mlp, heads = np.asarray(mlp, np.float64), np.asarray(heads, np.float64)
  y, x = mlp - mlp.mean(axis=0), heads - heads.mean(axis=0)
  columns = x.swapaxes(1, 2).reshape(-1, x.shape[1])
  weights = np.linalg.lstsq(columns, y.ravel(), rcond=None)[0]
  left = np.square(y.ravel() - columns @ weights).sum()
  total = np.square(y).sum()
  bias = mlp.mean(axis=0) - np.einsum("ND,N->D", heads.mean(axis=0), weights)
  return Regression(weights, bias, float(1 - left / total) if total else 1.0)


def _pick(x: Float[Array, "B T *d"], at: Int[Array, "B"]) -> Array:
  places = at.reshape((-1,) + (1,) * (x.ndim - 1))
  return jnp.take_along_axis(x, places, axis=1)[:, 0]


def _output(params: PyTree, config: configs.TransformerConfig) -> Array:
  if config.tie_embeddings:
    return params["token_embed"]["embedding"].T
  return params["output"]["kernel"]


def _check_linear(config: configs.TransformerConfig) -> None:
  for name in ("output_logits_soft_cap", "embed_proj_dim"):
    if getattr(config, name) is not None:
      raise errors.UserError(
          f"Logits are taken apart where {name} is None, got"
          f" {getattr(config, name)}."
      )
