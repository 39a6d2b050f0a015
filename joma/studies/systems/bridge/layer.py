"""The layer of every rung, from two free matrices to a Transformer's block.

Free, it is Scan & Snap's (https://arxiv.org/abs/2305.16380): with the counts x
of a context and its query m,

  c_l = x_l e^{z_ml} / sum,   f = c / |c|_2,   logits = Y^T f + R_m,

R_m, what the query alone says, being there with the residual only. With
embeddings e of a finite width, z_ml = e_m^T W e_l, and what is read out is

  logits_n = u_n^T h,   h = V sum_l f_l e_l + e_m + MLP,

again with e_m of the residual, and with the MLP where there is one. Embeddings
e and u are frozen, or train (untied), or are one and train (tied).

Letters: B samples, C tokens of a context, D width, M tokens, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scansnap_jax import dynamics

WIDTH = 64
_HIDDEN = 256
# Deviation of an embedding's coordinates.
_SCALE = WIDTH**-0.5
EMBEDDINGS = ("free", "frozen", "untied", "tied")

Params = Mapping[str, Array]


def init(
    key: Array,
    num_tokens: int,
    *,
    embeddings: str,
    has_residual: bool,
    has_mlp: bool,
) -> dict[str, Array]:
  """Draws embeddings and the MLP's way in; all else starts at 0.

  Args:
    key: Of the draw.
    num_tokens: M.
    embeddings: Of `EMBEDDINGS`; free has none.
    has_residual: The query itself reaches the output.
    has_mlp: There is an MLP, which free matrices never have.
  """
  square = jnp.zeros((num_tokens, num_tokens))
  if embeddings == "free":
    params = {"attn_logits": square, "decoder": square}
    return params | ({"residual": square} if has_residual else {})
  inward, outward, for_mlp = jax.random.split(key, 3)
  shape = (num_tokens, WIDTH)
  params = {
      "embedding": _SCALE * jax.random.normal(inward, shape),
      "query_key": jnp.zeros((WIDTH, WIDTH)),
      "value": jnp.zeros((WIDTH, WIDTH)),
  }
  if embeddings != "tied":
    params["unembedding"] = _SCALE * jax.random.normal(outward, shape)
  if has_mlp:
    params["mlp_in"] = _SCALE * jax.random.normal(for_mlp, (WIDTH, _HIDDEN))
    params["mlp_out"] = jnp.zeros((_HIDDEN, WIDTH))
  return params


def attn_logits(params: Params) -> Float[Array, "M M"]:
  """Z, row m of query m."""
  if "attn_logits" in params:
    return params["attn_logits"]
  embedding = params["embedding"]
  return embedding @ params["query_key"] @ embedding.T


def predict(
    params: Params,
    attn_logits: Float[Array, "M M"],
    context: Int[Array, "B C"],
    query: Int[Array, "B"],
    *,
    has_residual: bool,
) -> Float[Array, "B M"]:
  """Logits of the next token, with the given Z in place of the layer's own."""
  rows = jnp.arange(len(context))[:, None]
  counts = jnp.zeros((len(context), len(attn_logits))).at[rows, context].add(1)
  attended = dynamics.attended(counts, attn_logits[query])
  features = dynamics.l2_normalize(attended)
  if "decoder" in params:
    logits = features @ params["decoder"]
    return logits + params["residual"][query] if has_residual else logits
  embedding = params["embedding"]
  hidden = features @ embedding @ params["value"]
  if has_residual:
    hidden += embedding[query]
  if "mlp_in" in params:
    size = jnp.sqrt(jnp.square(hidden).mean(axis=-1, keepdims=True) + 1e-6)
    hidden += jax.nn.relu(hidden / size @ params["mlp_in"]) @ params["mlp_out"]
  return hidden @ params.get("unembedding", embedding).T


def mean_loss(
    logits: Float[Array, "B M"], label: Int[Array, "B"]
) -> Float[Array, ""]:
  """Cross-entropy, in nats."""
  log_probs = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_probs, label[:, None], axis=1).mean()


def mass(
    attn_logits: Float[Array, "M M"],
    context: Int[Array, "B C"],
    queries: Int[Array, "B Q"],
) -> Float[Array, "B C"]:
  """Attention on each place of a context, a mean over the queries that ask."""
  logits = attn_logits[queries[:, :, None], context[:, None, :]]
  return jax.nn.softmax(logits, axis=-1).mean(axis=1)
