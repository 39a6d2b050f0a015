"""One chunk of one head, forward and backward: plain algebra on C positions.

With S the state before the chunk, w_t = beta_t (value_t - kept_t^T key_t) is
what position t adds, at its key. These w solve a triangular system:

  A = strictly lower part of pair(key, key)          P = pair(query, key)
  E = value - (before key) S                         what is missing, so far
  (1 + beta A) w = beta E                            each sees the earlier ones
  out = (before query) S + P w
  S'  = total S + (after key)^T w

(the WY form of https://arxiv.org/abs/2406.06484). Backward, D being the
cotangent of S', and ' that of the others:

  w' = P^T out' + (after key) D            r = (1 + beta A)^-T w'
  beta' = sum r (E - A w)                  E' = beta r = value'
  P' = out' w^T     A' = -E' w^T           S := total D + (before query)^T out'
                                                - (before key)^T E'

The cotangent of the sum of logarithms up to t is what the arrays at t have of
products in which t is the later position, less that of those in which it is the
earlier one.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.algebra import fading
from kernels_pallas.gated_delta_rule.algebra import products


class Solver(Protocol):
  """Of a strictly lower triangular matrix; made of it."""

  def __call__(
      self, right: Float[Array, "C J"], *, is_transposed: bool = False
  ) -> Float[Array, "C J"]:
    """Solves (1 + lower) x = right, or (1 + lower)^T x = right."""
    ...


MakeSolver = Callable[[Float[Array, "C C"], products.Products], Solver]


class Chunk(NamedTuple):
  """Arrays of one chunk of one head, in the type of the sums.

  Attributes:
    query: Of the positions.
    key: The same.
    value: The same.
    beta: The same, a column.
    state: Before the chunk.
  """

  query: Float[Array, "C H"]
  key: Float[Array, "C H"]
  value: Float[Array, "C J"]
  beta: Float[Array, "C 1"]
  state: Float[Array, "H J"]


class _Added(NamedTuple):
  """What a chunk adds to its state, and on the way to that."""

  same: Float[Array, "C C"]
  missing: Float[Array, "C J"]
  added: Float[Array, "C J"]
  solve: Solver


def forward(
    chunk: Chunk, fades: fading.Fading, make_solver: MakeSolver
) -> tuple[Float[Array, "C J"], Float[Array, "H J"]]:
  """Returns out, without its scale, and the state after the chunk."""
  added = _add(chunk, fades, make_solver).added
  out = fades.product(fades.before * chunk.query, chunk.state)
  out += fades.product(fades.pair(chunk.query, chunk.key), added)
  return out, _next_state(chunk, fades, added)


def advance(
    chunk: Chunk, fades: fading.Fading, make_solver: MakeSolver
) -> Float[Array, "H J"]:
  """Returns the state after the chunk alone."""
  return _next_state(chunk, fades, _add(chunk, fades, make_solver).added)


def backward(
    chunk: Chunk,
    fades: fading.Fading,
    d_out: Float[Array, "C J"],
    d_state: Float[Array, "H J"],
    make_solver: MakeSolver,
) -> tuple[Chunk, Float[Array, "_ _"]]:
  """Returns cotangents of the chunk and of log_decay, as that was given."""
  query, key, _, beta, state = chunk
  product = fades.product
  same, missing, added, solve = _add(chunk, fades, make_solver)
  d_added = product(fades.pair(query, key), d_out, (0, 0))
  d_added += product(fades.after * key, d_state)
  d_right = solve(d_added, is_transposed=True)
  d_beta = d_right * (missing - product(same, added))
  d_value = beta * d_right
  d_query, earlier = fades.pull(product(d_out, added, (1, 1)), query, key)
  d_same = _strictly_lower(-product(d_value, added, (1, 1)))
  later, again = fades.pull(d_same, key, key)
  d_query += fades.before * product(d_out, state, (1, 1))
  later -= fades.before * product(d_value, state, (1, 1))
  to_end = fades.after * product(added, d_state, (1, 1))
  earlier += again + to_end
  kept = fades.total * d_state
  d_start = kept + product(fades.before * query, d_out, (0, 0))
  d_start -= product(fades.before * key, d_value, (0, 0))
  d_total = (key * to_end).sum(axis=0, keepdims=True)
  d_total += products.to_row((kept * state).sum(axis=1, keepdims=True))
  d_sums = query * d_query + key * (later - earlier)
  d_beta = d_beta.sum(axis=1, keepdims=True)
  cotangents = Chunk(d_query, later + earlier, d_value, d_beta, d_start)
  return cotangents, fades.pull_logs(d_sums, d_total)


class Sweep(NamedTuple):
  """What a chunk does to a state S, or to its cotangent.

    added = constant - factor S        S := total S + rows^T added

  and of the cotangent, in which the query reads, + query^T d_out.

  Attributes:
    constant: What it would add to a state of zeros.
    factor: What the state takes from that.
    rows: Where it is added.
    total: What is left of the state.
  """

  constant: Float[Array, "C J"]
  factor: Float[Array, "C H"]
  rows: Float[Array, "C H"]
  total: Float[Array, "H 1"]


def ahead(chunk: Chunk, fades: fading.Fading, make_solver: MakeSolver) -> Sweep:
  """Of the state, whatever that is."""
  _, key, value, beta, _ = chunk
  same = _strictly_lower(fades.pair(key, key))
  solve = make_solver(beta * same, fades.product)
  factor = solve(beta * (fades.before * key))
  rows = fades.after * key
  return Sweep(solve(beta * value), factor, rows, _by_row(fades, key))


def back(
    chunk: Chunk,
    fades: fading.Fading,
    d_out: Float[Array, "C J"],
    make_solver: MakeSolver,
) -> tuple[Sweep, Float[Array, "C H"]]:
  """Of the cotangent, from the chunk's end to its start; and the query."""
  query, key, _, beta, _ = chunk
  same = _strictly_lower(fades.pair(key, key))
  solve = make_solver(beta * same, fades.product)
  d_added = fades.product(fades.pair(query, key), d_out, (0, 0))
  d_value = beta * solve(d_added, is_transposed=True)
  factor = -beta * solve(fades.after * key, is_transposed=True)
  rows = -fades.before * key
  sweep = Sweep(d_value, factor, rows, _by_row(fades, key))
  return sweep, fades.before * query


def _by_row(
    fades: fading.Fading, key: Float[Array, "C H"]
) -> Float[Array, "H 1"]:
  return jnp.broadcast_to(fades.total, (key.shape[1], 1))


def _add(chunk: Chunk, fades: fading.Fading, make_solver: MakeSolver) -> _Added:
  _, key, value, beta, state = chunk
  same = _strictly_lower(fades.pair(key, key))
  missing = value - fades.product(fades.before * key, state)
  solve = make_solver(beta * same, fades.product)
  return _Added(same, missing, solve(beta * missing), solve)


def _next_state(
    chunk: Chunk, fades: fading.Fading, added: Float[Array, "C J"]
) -> Float[Array, "H J"]:
  kept = fades.total * chunk.state
  return kept + fades.product(fades.after * chunk.key, added, (0, 0))


def _strictly_lower(square: Float[Array, "C C"]) -> Float[Array, "C C"]:
  rows, columns = products.positions(square.shape[0])
  return jnp.where(columns < rows, square, 0)
