"""Which slot of its pages a new token takes, and which page is freed for it.

Letters: R rows, M pages of a row, S slots of a page.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib


class PageTable(NamedTuple):
  """Which pages of the pool each row has.

  Attributes:
    page_table: int32 [R, M]; what is at or past `num_pages` is not read.
    num_pages: int32 [R].
  """

  page_table: Int[Array, "R M"]
  num_pages: Int[Array, "R"]


class Given(NamedTuple):
  """Arrays of a step.

  Attributes:
    token: What each sequence adds.
    pool: Of pages.
    pages: Which of them each row has.
  """

  token: slots_lib.Token
  pool: slots_lib.Slots
  pages: PageTable


def choose(
    score: Float[Array, "R M S"],
    pos: Int[Array, "R M S"],
    num_pages: Int[Array, "R"],
    positions: Int[Array, "R"],
    is_by_page: bool,
    rule: rule_lib.Rule,
) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
  """The slot of each row, -1 where inactive, and whether its page is freed."""
  num_rows, size, page_size = pos.shape
  page = jax.lax.broadcasted_iota(jnp.int32, (num_rows, size), 1)
  is_used = page < num_pages[:, None]
  # Pages that are not there are never taken.
  order = rule_lib.order(score, pos, positions[:, None, None], rule)
  order = jnp.where(is_used[..., None], order, jnp.inf)
  slot = jnp.argmin(order.reshape(num_rows, -1), axis=-1)
  is_freed = jnp.zeros(num_rows, bool)
  if is_by_page:
    # One protected token makes a page's sum infinite.
    of_page = order.sum(axis=-1)
    is_full = (
        jnp.take_along_axis(order.reshape(num_rows, -1), slot[:, None], axis=1)[
            :, 0
        ]
        > -jnp.inf
    )
    least = jnp.argmin(of_page, axis=-1)
    is_freed = is_full & (of_page.min(axis=-1) < jnp.inf)
    slot = jnp.where(is_freed, least * page_size, slot)
  is_active = positions >= 0
  slot = jnp.where(is_active, slot, -1).astype(jnp.int32)
  return slot, is_freed & is_active
