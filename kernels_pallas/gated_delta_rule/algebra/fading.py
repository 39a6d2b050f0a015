"""What decays leave between positions of a chunk, and products that fade so.

  pair(rows, key)_ts = sum_h rows_th key_sh exp(sum of log_decay_h over (s, t])

for s <= t, else 0. Every exponent is a sum of logarithms that are at most 0,
over just the positions between: none overflows, and none is a difference of
sums that are larger than itself.

With one decay a head, the powers are a square of factors. With one a key
channel they do not leave the product as factors of pairs, but as factors of its
two sides: a pair whose positions first differ in bit m (of value 2^m) has a
border of blocks of 2^m positions between the two, and

  exp(sum over (s, t]) = exp(sum over (border, t]) exp(sum over (s, border]).

So the pairs of each bit are one product of sides that are scaled toward the
border.
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.algebra import products


@dataclasses.dataclass(frozen=True)
class ByHead:
  """One decay a head.

  Attributes:
    product: How to multiply.
    weights: [C, C], what is left of position s at t >= s, else 0.
    before: [C, 1], of what was there before the chunk, at t.
    after: [C, 1], of position s at the end of the chunk.
    total: [1, 1], of what was there before the chunk, at its end.
  """

  product: products.Products
  weights: Float[Array, "C C"]
  before: Float[Array, "C 1"]
  after: Float[Array, "C 1"]
  total: Float[Array, "1 1"]

  @classmethod
  def of(
      cls, product: products.Products, log_decay: Float[Array, "1 C"]
  ) -> "ByHead":
    """From logarithms, of positions along the lanes."""
    rows, columns = products.positions(log_decay.shape[1])
    # [s, u]: what position u takes from s before it.
    later = jnp.where(columns > rows, log_decay, 0)
    # [u, s]: the same, summed over u up to t.
    taken = jnp.where(rows > columns, products.to_column(log_decay), 0)
    weights = jnp.exp(product.sums_until(taken))
    before = jnp.where(columns <= rows, log_decay, 0)
    total = lambda x: x.sum(axis=1, keepdims=True)
    return cls(
        product,
        jnp.where(columns <= rows, weights, 0),
        jnp.exp(total(before)),
        jnp.exp(total(later)),
        jnp.exp(total(log_decay)),
    )

  def pair(
      self, rows: Float[Array, "C H"], key: Float[Array, "C H"]
  ) -> Float[Array, "C C"]:
    """See the module."""
    return self.weights * self.product(rows, key, (1, 1))

  def pull(
      self,
      d_pairs: Float[Array, "C C"],
      rows: Float[Array, "C H"],
      key: Float[Array, "C H"],
  ) -> tuple[Float[Array, "C H"], Float[Array, "C H"]]:
    """Cotangents of rows and key, from those of `pair` where s <= t."""
    d_pairs = self.weights * d_pairs
    return self.product(d_pairs, key), self.product(d_pairs, rows, (0, 0))

  def pull_logs(
      self, d_sums: Float[Array, "C H"], d_total: Float[Array, "1 H"]
  ) -> Float[Array, "1 C"]:
    """Cotangent of log_decay.

    Args:
      d_sums: Of the sum of logarithms up to each position.
      d_total: Of the sum over the chunk.
    """
    rows, columns = products.positions(d_sums.shape[0])
    column = d_sums.sum(axis=1, keepdims=True)
    from_here = jnp.where(columns <= rows, column, 0)
    total = d_total.sum(axis=1, keepdims=True)
    return from_here.sum(axis=0, keepdims=True) + total


@dataclasses.dataclass(frozen=True)
class ByChannel:
  """One decay a key channel.

  Attributes:
    product: How to multiply.
    sides: [C, H] of each bit: what is left at the border, or after it.
    before: [C, H], of what was there before the chunk, at t.
    after: [C, H], of position s at the end of the chunk.
    total: [H, 1], of what was there before the chunk, at its end.
  """

  product: products.Products
  sides: tuple[Float[Array, "C H"], ...]
  before: Float[Array, "C H"]
  after: Float[Array, "C H"]
  total: Float[Array, "H 1"]

  @classmethod
  def of(
      cls, product: products.Products, log_decay: Float[Array, "C H"]
  ) -> "ByChannel":
    """From logarithms; C is a power of 2."""
    sums_of = _rolled_sums if product.in_kernel else _sums
    sides, until, after = sums_of(log_decay)
    total = products.to_column(log_decay.sum(axis=0, keepdims=True))
    ends = (jnp.exp(x) for x in (until, after, total))
    return cls(product, tuple(map(jnp.exp, sides)), *ends)

  def pair(
      self, rows: Float[Array, "C H"], key: Float[Array, "C H"]
  ) -> Float[Array, "C C"]:
    """See the module."""
    t, s = products.positions(rows.shape[0])
    own = (rows * key).sum(axis=1, keepdims=True)
    pairs = jnp.where(t == s, own, 0)
    for bit, side in enumerate(self.sides):
      found = self.product(rows * side, key * side, (1, 1))
      pairs = jnp.where(products.differ(t, s, bit), found, pairs)
    return pairs

  def pull(
      self,
      d_pairs: Float[Array, "C C"],
      rows: Float[Array, "C H"],
      key: Float[Array, "C H"],
  ) -> tuple[Float[Array, "C H"], Float[Array, "C H"]]:
    """Cotangents of rows and key, from those of `pair` where s <= t."""
    t, s = products.positions(rows.shape[0])
    own = jnp.where(t == s, d_pairs, 0).sum(axis=1, keepdims=True)
    d_rows, d_key = own * key, own * rows
    for bit, side in enumerate(self.sides):
      part = jnp.where(products.differ(t, s, bit), d_pairs, 0)
      d_rows += side * self.product(part, key * side)
      d_key += side * self.product(part, rows * side, (0, 0))
    return d_rows, d_key

  def pull_logs(
      self, d_sums: Float[Array, "C H"], d_total: Float[Array, "1 H"]
  ) -> Float[Array, "C H"]:
    """Cotangent of log_decay, see `ByHead.pull_logs`."""
    return self.product.sums_from(d_sums) + d_total


_Sums = tuple[
    list[Float[Array, "C H"]], Float[Array, "C H"], Float[Array, "C H"]
]


def _rolled_sums(log_decay: Float[Array, "C H"]) -> _Sums:
  """Sums to the border of each bit, up to each position, and after it."""
  position = products.rows_of(log_decay.shape)
  # In the block of a position: up to it, and after it.
  until, after = log_decay, jnp.zeros_like(log_decay)
  sides = []
  for bit in range(log_decay.shape[0].bit_length() - 1):
    size = 1 << bit
    is_later = (position >> bit) & 1 == 1
    sides.append(jnp.where(is_later, until, after))
    whole = until + after
    other = jnp.where(
        is_later, jnp.roll(whole, size, 0), jnp.roll(whole, -size, 0)
    )
    until = until + jnp.where(is_later, other, 0)
    after = after + jnp.where(is_later, 0, other)
  return sides, until, after


def _sums(log_decay: Float[Array, "C H"]) -> _Sums:
  """The same by products."""
  t, s = products.positions(log_decay.shape[0])
  is_until = s <= t
  taken = []
  for bit in range(log_decay.shape[0].bit_length() - 1):
    is_own = (t ^ s) >> bit == 0
    is_later = (t >> bit) & 1 == 1
    taken.append(is_own & (is_until == is_later))
  taken += [is_until, ~is_until]
  sums = products.sums_of(jnp.concatenate(taken), log_decay)
  *sides, until, after = jnp.split(sums, len(taken))
  return sides, until, after


Fading: TypeAlias = ByHead | ByChannel


def of(product: products.Products, log_decay: Float[Array, "C D"]) -> Fading:
  """By head if D is 1, else by channel."""
  if log_decay.shape[1] == 1:
    return ByHead.of(product, log_decay.T)
  return ByChannel.of(product, log_decay)
