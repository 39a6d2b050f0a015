"""JoMA's block as a module, and stacks of it.

The equations are those of `dynamics` (https://arxiv.org/abs/2310.00535):

  b = sigma(z_q / T) o x / A     attention of query q over contextual tokens
  f = U_C b + u_q                embedded, with the query as residual
  h = phi(W^T f)                 hidden nodes

with a free z_q for each query and one W for all. `to_dynamics` gives the same
block in the theory's terms, so that every law can be held against training. In
a stack the hidden nodes of a block are the contextual tokens of the next one.

Each block sows `attn_logits` (z_q / T), `attn_weights` (b), `features` (f),
`hidden_pre` (W^T f) and `hidden` (h) under "intermediates".

Letters as in `joma.block`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from joma.theory import dynamics


class JomaBlock(nn.Module):
  """One block; parameters W [D, F] and Z [Q, M], and U [M + Q, D] if trained.

  Attributes:
    num_tokens: M.
    hidden_dim: F.
    num_queries: Q.
    kind: Attention, activation, temperature, and whether there is a residual.
    embedding: Rows of U are those of contextual tokens, then of queries.
      `identity` takes unit vectors, `orthonormal` fixed random ones (in the
      collection "constants"), `trained` starts there and is a parameter.
    embed_dim: D; None is M + Q, the least that fixed embeddings need. Trained
      ones may have less: they start at N(0, 1 / D).
    w_scale: Standard deviation of W's initial values.
    z_scale: Standard deviation of Z's initial values.
  """

  num_tokens: int
  hidden_dim: int
  num_queries: int = 1
  kind: dynamics.Block = dynamics.Block(activation="relu")
  embedding: Literal["identity", "orthonormal", "trained"] = "identity"
  embed_dim: int | None = None
  w_scale: float = 0.01
  z_scale: float = 0.01

  @nn.compact
  def __call__(
      self, counts: Num[Array, "B M"], query: Int[Array, "B"]
  ) -> Float[Array, "B F"]:
    """Returns the hidden nodes.

    Args:
      counts: x, counts or frequencies. Softmax attention leaves out what is
        not above 0.
      query: q, each in [0, Q).

    Raises:
      ValueError: If there are not M counts a row.
    """
    if counts.shape[1] != self.num_tokens:
      raise ValueError(
          f"A block of num_tokens={self.num_tokens} got counts of"
          f" {counts.shape[1]} tokens."
      )
    normal = nn.initializers.normal
    table = self._embedding()
    logits_shape = (self.num_queries, self.num_tokens)
    attn_logits = self.param("Z", normal(self.z_scale), logits_shape)
    lower_shape = (table.shape[1], self.hidden_dim)
    lower = self.param("W", normal(self.w_scale), lower_shape)
    batch = _to_batch(self, table, counts, query)
    attn_weights = dynamics.attended_tokens(attn_logits, batch, self.kind)
    features = dynamics.mlp_input(attn_weights, batch, self.kind)
    hidden_pre = features @ lower
    hidden = self.kind.phi(hidden_pre)
    for name, value in (
        ("attn_logits", attn_logits[query] / self.kind.temperature),
        ("attn_weights", attn_weights),
        ("features", features),
        ("hidden_pre", hidden_pre),
        ("hidden", hidden),
    ):
      self.sow("intermediates", name, value)
    return hidden

  def _embedding(self) -> Float[Array, "E D"]:
    num_rows = self.num_tokens + self.num_queries
    width = num_rows if self.embed_dim is None else self.embed_dim
    init = nn.initializers.orthogonal()
    if self.embedding == "trained":
      # Too narrow for orthonormal rows; N(0, 1 / D) has length 1 on average.
      if width < num_rows:
        init = nn.initializers.normal(width**-0.5)
      return self.param("U", init, (num_rows, width))
    if width < num_rows:
      raise ValueError(
          f"{num_rows} orthonormal embeddings need embed_dim >= {num_rows}, got"
          f" {width}."
      )
    if self.embedding == "identity":
      return jnp.eye(num_rows, width)
    # In "constants", not "params": no optimizer sees them, no rate freezes
    # them.
    draw = lambda: init(self.make_rng("params"), (num_rows, width))
    return self.variable("constants", "U", draw).value


class JomaStack(nn.Module):
  """Several blocks; the hidden nodes of one are the tokens of the next.

  Softmax attention wants hidden nodes that are not negative, such as ReLU's.

  Attributes:
    blocks: From the bottom. Each one's `num_tokens` is the `hidden_dim` of the
      one below; their variables stand under `block_name`.
  """

  blocks: tuple[JomaBlock, ...]

  @nn.compact
  def __call__(
      self, counts: Num[Array, "B M"], query: Int[Array, "B"]
  ) -> Float[Array, "B F"]:
    """Returns the hidden nodes of the last block."""
    for block in self.blocks:
      # Every block has the same query, and its own W, Z and embeddings.
      counts = block(counts, query)
    return counts


def block_name(index: int) -> str:
  """Where the variables of a stack's block stand, the lowest one first."""
  return f"blocks_{index}"  # Linen's own name for an entry of `blocks`.


def to_dynamics(
    block: JomaBlock,
    variables: Mapping[str, Any],
    counts: Num[Array, "B M"],
    query: Int[Array, "B"],
) -> tuple[dynamics.Params, dynamics.Batch]:
  """Writes a block in the theory's terms, with nothing above it.

  `dynamics.hidden(params, batch, block.kind)` are its hidden nodes. The laws
  want fixed embeddings: trained ones are taken as they are now.

  Args:
    block: The module.
    variables: Its own variables, "constants" included where it has any.
    counts: x.
    query: q.

  Returns:
    (params, batch); `dynamics.reduce(params, batch).v` is U_C^T W.
  """
  params = variables["params"]
  drawn = {**variables.get("constants", {}), **params}
  num_rows = block.num_tokens + block.num_queries
  table = drawn["U"] if "U" in drawn else jnp.eye(num_rows, len(params["W"]))
  batch = _to_batch(block, table, counts, query)
  return dynamics.Params(params["W"], params["Z"]), batch


def _to_batch(
    block: JomaBlock,
    table: Float[Array, "E D"],
    counts: Num[Array, "B M"],
    query: Int[Array, "B"],
) -> dynamics.Batch:
  tokens, queries = table[: block.num_tokens], table[block.num_tokens :]
  return dynamics.Batch(counts, query, tokens.T, queries.T)
