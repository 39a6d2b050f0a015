"""One block of JoMA (https://arxiv.org/abs/2310.00535) and its gradient flow.

  h_k = phi(w_k^T f),   f = U_C b + u_q,   b = sigma(z_q) o x / A

  linear attention    b = (z / T) o x
  exp attention       b = e^{z / T} o x
  softmax attention   b = e^{z / T} o x / sum_l e^{z_l / T} x_l

The paper's text was not at hand: the block and its flow are a reconstruction,
in which every equation is derived here and tested against automatic
differentiation.

  x, q, u_q   counts of the contextual tokens, query token, its embedding, which
              reaches the MLP beside attention (the residual)
  U_C         embeddings of the contextual tokens, orthonormal columns that are
              orthogonal to every u_q; fixed
  W, z_q      lower MLP layer (columns w_k) and attention logits of query q
  v, xi       U_C^T W, the MLP seen through the embeddings, and U_Q^T W
  g_k, T      -d loss / d h_k, temperature

Letters as in `joma.theory`.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PyTree

from scansnap_jax import dynamics as one_layer

Attention = Literal["linear", "exp", "softmax"]
Activation = Callable[[Array], Array]
# Of the hidden nodes [B, F] and the upper weights; averages over samples.
Loss = Callable[[Array, PyTree], Array]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda h: h,
    "relu": jax.nn.relu,
    "gelu": lambda h: jax.nn.gelu(h, approximate=False),
    "silu": jax.nn.silu,
    "quadratic": lambda h: h**2 / 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
  """What kind of block; static under `jax.jit`.

  Attributes:
    attention: How logits turn counts into b.
    activation: phi, by its name in `ACTIVATIONS` or as an elementwise function.
    temperature: T, by which the logits are divided.
    has_residual: Whether u_q is part of f.

  Raises:
    ValueError: If a name is unknown or the temperature not positive.
  """

  attention: Attention = "softmax"
  activation: str | Activation = "identity"
  temperature: float = 1.0
  has_residual: bool = True

  def __post_init__(self):
    if self.attention not in get_args(Attention):
      raise ValueError(
          f"attention={self.attention!r} is none of {get_args(Attention)}."
      )
    if isinstance(self.activation, str) and self.activation not in ACTIVATIONS:
      raise ValueError(
          f"activation={self.activation!r} is none of {tuple(ACTIVATIONS)}; a"
          " function may stand in place of a name."
      )
    if not self.temperature > 0:
      raise ValueError(f"temperature must be positive, got {self.temperature}.")

  @property
  def phi(self) -> Activation:
    """The activation as a function."""
    if isinstance(self.activation, str):
      return ACTIVATIONS[self.activation]
    return self.activation


class Batch(NamedTuple):
  """Samples and the fixed embeddings.

  Attributes:
    counts: x [B, M], counts or frequencies, at least 0.
    query: q [B], each in [0, Q).
    embedding: U_C [D, M].
    query_embedding: The u_q as columns [D, Q].
  """

  counts: Num[Array, "B M"]
  query: Int[Array, "B"]
  embedding: Float[Array, "D M"]
  query_embedding: Float[Array, "D Q"]


class Params(NamedTuple):
  """What is trained; also its velocity.

  Attributes:
    lower: W [D, F].
    attn_logits: z [Q, M].
    upper: Any tree that the loss takes beside the hidden nodes.
  """

  lower: Float[Array, "D F"]
  attn_logits: Float[Array, "Q M"]
  upper: PyTree = ()


class Reduced(NamedTuple):
  """The same state without the width D; also its velocity.

  Attributes:
    v: U_C^T W [M, F].
    offset: xi = U_Q^T W [Q, F], what the residual adds to the preactivations.
    attn_logits: z [Q, M].
    upper: As in `Params`.
  """

  v: Float[Array, "M F"]
  offset: Float[Array, "Q F"]
  attn_logits: Float[Array, "Q M"]
  upper: PyTree = ()


def attend(
    attn_logits: Float[Array, "B M"],
    counts: Num[Array, "B M"],
    attention: Attention,
) -> Float[Array, "B M"]:
  """Computes b, what attention passes on of each token.

  Args:
    attn_logits: z_q / T.
    counts: x.
    attention: Kind of attention; softmax leaves out what is not above 0.

  Returns:
    b; zeros for an empty context.
  """
  match attention:
    case "linear":
      return attn_logits * counts
    case "exp":
      return jnp.exp(attn_logits) * counts
    case "softmax":
      return one_layer.attended(counts, attn_logits)


def attended_tokens(
    attn_logits: Float[Array, "Q M"], batch: Batch, block: Block
) -> Float[Array, "B M"]:
  """Computes b of each sample from the logits of all queries."""
  scaled = attn_logits[batch.query] / block.temperature
  return attend(scaled, batch.counts, block.attention)


def mlp_input(
    attended: Float[Array, "B M"], batch: Batch, block: Block
) -> Float[Array, "B D"]:
  """Computes f = U_C b + u_q."""
  f = attended @ batch.embedding.T
  if block.has_residual:
    f += batch.query_embedding.T[batch.query]
  return f


def hidden(params: Params, batch: Batch, block: Block) -> Float[Array, "B F"]:
  """Computes the hidden nodes h_k = phi(w_k^T f) of each sample."""
  b = attended_tokens(params.attn_logits, batch, block)
  return block.phi(mlp_input(b, batch, block) @ params.lower)


def velocity(params: Params, batch: Batch, block: Block, loss: Loss) -> Params:
  """Computes -d loss / d params by automatic differentiation.

  Args:
    params: Current state.
    batch: All samples.
    block: The kind of block.
    loss: Of the hidden nodes and the upper weights, a mean over samples.

  Returns:
    dW/dt, dz/dt and the velocity of the upper weights, at rate 1.
  """
  # What the closed form below is tested against: it knows of the block only its
  # forward pass.
  total = lambda params: loss(hidden(params, batch, block), params.upper)
  return jax.tree.map(jnp.negative, jax.grad(total)(params))


def reduce(params: Params, batch: Batch) -> Reduced:
  """Computes the reduced variables v = U_C^T W and xi = U_Q^T W."""
  return Reduced(
      batch.embedding.T @ params.lower,
      batch.query_embedding.T @ params.lower,
      params.attn_logits,
      params.upper,
  )


def reduced_velocity(
    state: Reduced, batch: Batch, block: Block, loss: Loss
) -> tuple[Reduced, Float[Array, "Q M"]]:
  """Computes the flow of v, xi and z in closed form (derived here).

  With gh_k = g_k phi'(w_k^T f) and w_k^T f = v_k^T b + xi_qk,

    dv_k/dt = E[gh_k b],    dxi_mk/dt = sum_n u_m^T u_n E[gh_k; q = n],
    dz_m/dt = E[(db/dz)^T sum_k gh_k v_k; q = m],

  where E[.; q = m] = P(q = m) E[. | q = m], as gradients of the mean loss have
  it, and T db/dz = diag(x), diag(b) or diag(b) - b b^T by kind of attention.
  It needs U_C^T U_C = I and U_C^T u_q = 0.

  Args:
    state: Current state.
    batch: All samples; of the embeddings only u_m^T u_n matters.
    block: The kind of block.
    loss: Of the hidden nodes and the upper weights, a mean over samples.

  Returns:
    The velocity at rate 1, and E[b b^T sum_k gh_k v_k; q = m] / T, which
    softmax attention subtracts from what exp attention has; 0 for the others.
  """
  b = attended_tokens(state.attn_logits, batch, block)
  inner = b @ state.v
  if block.has_residual:
    inner += state.offset[batch.query]
  # phi and phi' in one go; phi is elementwise, so that the tangent 1 gives its
  # derivative everywhere.
  h, slope = jax.jvp(block.phi, (inner,), (jnp.ones_like(inner),))
  g, upper = jax.tree.map(jnp.negative, jax.grad(loss, (0, 1))(h, state.upper))
  # The mean over samples is in g, as the loss is a mean: E[gh_k b] is a plain
  # matrix product below.
  gh = g * slope
  back = gh @ state.v.T / block.temperature
  shared = jnp.zeros_like(b)
  if block.attention == "softmax":
    # b b^T v gh without the matrix b b^T: first the scalar b^T back.
    shared = b * jnp.sum(b * back, axis=-1, keepdims=True)
  # T db/dz: diag(x) for linear, diag(b) for exp and the first part of softmax
  # attention.
  gate = batch.counts if block.attention == "linear" else b
  num_queries = len(state.attn_logits)
  per_query = lambda rows: jax.ops.segment_sum(rows, batch.query, num_queries)
  # The only thing of the embeddings that the reduced flow still sees.
  gram = batch.query_embedding.T @ batch.query_embedding
  pushed = per_query(gh) if block.has_residual else jnp.zeros_like(state.offset)
  dz = per_query(gate * back - shared)
  return Reduced(b.T @ gh, gram @ pushed, dz, upper), per_query(shared)
