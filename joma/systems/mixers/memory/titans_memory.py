"""A network that learns pairs of keys and values as a text is read.

  S_t = eta_t S_{t-1} - theta_t grad |M(k_t) - v_t|^2,   at weights of the
        start of t's chunk
  M_t = (1 - alpha_t) M_{t-1} + S_t,   out_t = M_t(q_t)
  M(x) = W_d gelu(W_{d-1} ... gelu(W_1 x)),   without biases

Titans (https://arxiv.org/abs/2501.00663). In chunks of one token gradients are
of the newest weights; both recurrences over a chunk are associative scans.

Letters: B batch, T tokens, N heads, H head size, C chunks, U tokens of a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A matrix [..., H, H] for each layer of the network, inputs first.
Weights = tuple[Array, ...]


class State(NamedTuple):
  """What a text has left, leaves [B, N, H, H].

  Attributes:
    start: Weights at the start of the chunk, of which gradients are.
    memory: The newest, M.
    momentum: S.
  """

  start: Weights
  memory: Weights
  momentum: Weights


class Tokens(NamedTuple):
  """What is learned and asked, float32.

  Attributes:
    query: [B, T, N, H].
    key: Likewise.
    value: Likewise.
    keep: eta [B, T, N].
    rate: theta.
    forget: alpha.
  """

  query: Float[Array, "B T N H"]
  key: Float[Array, "B T N H"]
  value: Float[Array, "B T N H"]
  keep: Float[Array, "B T N"]
  rate: Float[Array, "B T N"]
  forget: Float[Array, "B T N"]


class Rule(NamedTuple):
  """How a memory answers, and by what it learns.

  Attributes:
    is_mean: Whether squares are averaged over channels, not summed.
    is_exact: Whether gelu is that of the error function, not the one of tanh.
  """

  is_mean: bool = False
  is_exact: bool = False


_RULE = Rule()


def begin(weights: Weights, batch_size: int) -> State:
  """The state before the first token, of weights [N, H, H]."""
  wide = lambda: tuple(
      jnp.broadcast_to(w[None], (batch_size, *w.shape)) for w in weights
  )
  # Each its own arrays, which a step may write in place.
  return State(wide(), wide(), jax.tree.map(jnp.zeros_like, wide()))


def recall(
    weights: Weights, x: Float[Array, "H"], rule: Rule = _RULE
) -> Float[Array, "H"]:
  """M(x) of one head, of matrices [H, H]."""
  for matrix in weights[:-1]:
    inner = jnp.einsum("H,HJ->J", x, matrix)
    x = jax.nn.gelu(inner, approximate=not rule.is_exact)
  return jnp.einsum("H,HJ->J", x, weights[-1])


def gradient(
    weights: Weights,
    key: Float[Array, "H"],
    value: Float[Array, "H"],
    rule: Rule = _RULE,
) -> Weights:
  """Gradient of the squared error of one pair.

  Args:
    weights: Of one head.
    key: What is asked.
    value: What it should say.
    rule: How it says it, and what counts.
  """

  def loss(weights: Weights) -> Float[Array, ""]:
    squares = jnp.square(recall(weights, key, rule) - value)
    return squares.mean() if rule.is_mean else squares.sum()

  return jax.grad(loss)(weights)


def step(
    state: State,
    tokens: Tokens,
    is_token: Bool[Array, "B 1"],
    is_end: Bool[Array, "B"],
    rule: Rule = _RULE,
) -> tuple[Float[Array, "B 1 N H"], State]:
  """One token a sequence.

  Args:
    state: Before it.
    tokens: T = 1.
    is_token: False is padding, which changes nothing.
    is_end: Whether it is the last of its chunk.
    rule: See `gradient`.
  """
  memory, after = _chunk(state, tokens, is_token, rule)
  # Weights stand as an argument there, and are not computed for each reader.
  out = jax.lax.cond(
      is_token.any(),
      lambda: _read(memory, tokens.query, rule),
      lambda: jnp.zeros_like(tokens.value),
  )
  is_over = is_token[:, 0] & is_end
  # Most steps leave the start as it is, and then write nothing there.
  start = jax.lax.cond(
      is_over.any(),
      lambda: chosen(is_over, after.memory, state.start),
      lambda: state.start,
  )
  return out, after._replace(start=start)


def chosen(which: Bool[Array, "B"], new: Weights, old: Weights) -> Weights:
  """The new weights of some sequences, the old ones of the others."""
  is_new = which[:, None, None, None]
  return tuple(
      jnp.where(is_new, one, two) for one, two in zip(new, old, strict=True)
  )


def sweep(
    state: State,
    tokens: Tokens,
    lengths: Int[Array, "B"],
    size: int,
    rule: Rule = _RULE,
) -> tuple[Float[Array, "B T N H"], State]:
  """Whole texts, a chunk at a time.

  Args:
    state: Before the first token, which begins a chunk.
    tokens: Of the texts.
    lengths: Tokens of each text; what follows changes nothing.
    size: U.
    rule: See `gradient`.
  """
  length = tokens.query.shape[1]
  runs = jax.tree.map(lambda x: _in_chunks(x, size), tokens)
  num_chunks = -(-length // size)

  def one(
      state: State, given: tuple[Array, Tokens]
  ) -> tuple[State, Float[Array, "B U N H"]]:
    number, tokens = given
    left = jnp.clip(lengths - number * size, 0, size)
    is_token = jnp.arange(size)[None] < left[:, None]
    memory, after = _chunk(state, tokens, is_token, rule)
    out = _read(memory, tokens.query, rule)
    start = chosen(left == size, after.memory, state.start)
    return after._replace(start=start), out

  # A gradient keeps the state of each chunk's start, not of every token.
  state, outs = jax.lax.scan(
      jax.checkpoint(one), state, (jnp.arange(num_chunks), runs)
  )
  outs = jnp.moveaxis(outs, 0, 1)
  return outs.reshape(len(outs), -1, *outs.shape[3:])[:, :length], state


def _in_chunks(x: Float[Array, "B T *d"], size: int) -> Array:
  fill = [(0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)]
  x = jnp.pad(x, fill)
  return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)


def _chunk(
    state: State, tokens: Tokens, is_token: Bool[Array, "B U"], rule: Rule
) -> tuple[Weights, State]:
  """Weights after each of a chunk's tokens [U, B, N, H, H], and the newest."""
  # Tokens first, as scans go along them.
  first = lambda x: jnp.moveaxis(x, 1, 0)
  where = first(is_token)[..., None]
  key, value = first(tokens.key), first(tokens.value)
  keep = jnp.where(where, first(tokens.keep), 1.0)
  rate = jnp.where(where, first(tokens.rate), 0.0)
  rest = jnp.where(where, 1 - first(tokens.forget), 1.0)
  # Over tokens, sequences and heads; the weights are those of the start.
  of_one = lambda weights, key, value: gradient(weights, key, value, rule)
  of_heads = jax.vmap(jax.vmap(of_one))
  grads = jax.vmap(of_heads, in_axes=(None, 0, 0))(state.start, key, value)
  wide = lambda x: x[..., None, None]
  pushes = jax.tree.map(lambda x: -wide(rate) * x, grads)
  momentum = jax.tree.map(
      lambda push, old: _recurrence(wide(keep), push, old),
      pushes,
      state.momentum,
  )
  memory = jax.tree.map(
      lambda push, old: _recurrence(
          wide(rest), jnp.where(wide(where), push, 0), old
      ),
      momentum,
      state.memory,
  )
  last = lambda tree: jax.tree.map(lambda x: x[-1], tree)
  return memory, State(state.start, last(memory), last(momentum))


def _read(
    memory: Weights, query: Float[Array, "B U N H"], rule: Rule
) -> Float[Array, "B U N H"]:
  """What each token recalls by the weights after it."""
  in_turn = jnp.moveaxis(query, 1, 0)
  of_one = lambda weights, x: recall(weights, x, rule)
  out = jax.vmap(jax.vmap(jax.vmap(of_one)))(memory, in_turn)
  return jnp.moveaxis(out, 0, 1)


def _recurrence(
    factor: Float[Array, "U B N 1 1"],
    added: Float[Array, "U B N H H"],
    before: Float[Array, "B N H H"],
) -> Float[Array, "U B N H H"]:
  """y_t = factor_t y_{t-1} + added_t, all y of a chunk."""

  def join(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple:
    return one[0] * two[0], two[0] * one[1] + two[1]

  factors, sums = jax.lax.associative_scan(join, (factor, added))
  return factors * before[None] + sums
