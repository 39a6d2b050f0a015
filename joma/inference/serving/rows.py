"""The programs of a batch whose rows are sequences of their own.

Shapes are those of the batch, whoever stands in it, so that each is compiled
once. A row knows nothing of its neighbours: its position, its draws and its
slots are its own.

Letters: B rows, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree
import numpy as np

from joma.inference import decode_steps
from joma.inference import sampling
from joma.inference import sampling_config
from joma.inference.cache import storage
from joma.transformer import model as models


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Between two steps.

  Attributes:
    tokens: Newest token of each row, int32 [B].
    positions: Where it stands, int32 [B].
    num_new: Tokens that a row has yielded, int32 [B].
    limits: How many it may, int32 [B].
    is_free: Whether a row has nobody, or who has ended, bool [B].
    is_finite: Whether the newest token's logits were numbers, bool [B].
  """

  tokens: storage.Leaf
  positions: storage.Leaf
  num_new: storage.Leaf
  limits: storage.Leaf
  is_free: storage.Leaf
  is_finite: storage.Leaf


def empty(num_rows: int) -> Rows:
  """Returns rows of nobody."""
  # One array each: what is donated must not lie in one place twice.
  zeros = lambda: jnp.zeros(num_rows, jnp.int32)
  ones = lambda: jnp.ones(num_rows, bool)
  return Rows(zeros(), zeros(), zeros(), zeros(), ones(), ones())


@functools.partial(jax.jit, donate_argnames=("rows", "kv_cache"))
def join(
    rows: Rows,
    kv_cache: PyTree,
    row: Int[Array, ""] | np.int32,
    state: decode_steps.DecodeState,
    limit: Int[Array, ""] | np.int32,
) -> tuple[Rows, PyTree]:
  """Puts a sequence into a row, in the place of whoever was there.

  Args:
    rows: Donated.
    kv_cache: Of the batch; donated.
    row: Which.
    state: Of the sequence alone, after its prompt.
    limit: Tokens that it may yield, that of its prompt among them.
  """
  is_row = jnp.arange(len(rows.tokens)) == row
  is_over = state.is_done[0] | (limit <= 1)
  rows = jax.tree.map(
      lambda old, new: jnp.where(is_row, new, old),
      rows,
      Rows(
          tokens=state.tokens[0],
          positions=state.positions[0],
          num_new=jnp.int32(1),
          limits=jnp.asarray(limit, jnp.int32),
          is_free=is_over,
          is_finite=state.is_finite[0],
      ),
  )
  put = lambda x, one: jax.lax.dynamic_update_index_in_dim(x, one[0], row, 0)
  return rows, jax.tree.map(put, kv_cache, state.kv_cache)


@jax.jit
def leave(rows: Rows, row: Int[Array, ""] | np.int32) -> Rows:
  """Frees a row before its sequence has ended."""
  is_row = jnp.arange(len(rows.tokens)) == row
  return dataclasses.replace(rows, is_free=rows.is_free | is_row)


@functools.partial(
    jax.jit,
    static_argnames=("model", "sampler", "eos_ids"),
    donate_argnames="kv_cache",
)
def step(
    model: models.Transformer,
    params: PyTree,
    rows: Rows,
    kv_cache: PyTree,
    sampler: sampling_config.SamplingConfig,
    eos_ids: tuple[int, ...],
) -> tuple[Rows, PyTree]:
  """Takes in the newest token of each row and draws the next one.

  Free rows take in nothing. A row draws as its sequence would alone.

  Args:
    model: Static.
    params: Of the model.
    rows: Who stands where.
    kv_cache: Of all before the newest tokens; donated.
    sampler: How tokens are chosen.
    eos_ids: Tokens that end a sequence.
  """
  positions = jnp.where(rows.is_free, -1, rows.positions)
  logits, kv_cache = model.apply(
      {"params": params},
      rows.tokens[:, None],
      positions=positions[:, None],
      kv_cache=kv_cache,
  )
  drawn = sampling.draw_by(logits[:, 0], sampler, _keys(rows, sampler))
  tokens = jnp.where(rows.is_free, rows.tokens, drawn)
  num_new = rows.num_new + ~rows.is_free
  is_over = decode_steps.is_eos(tokens, eos_ids) | (num_new >= rows.limits)
  is_finite = decode_steps.are_finite(logits[:, 0], tokens)
  return (
      Rows(
          tokens=tokens,
          positions=rows.positions + ~rows.is_free,
          num_new=num_new,
          limits=rows.limits,
          is_free=rows.is_free | is_over,
          is_finite=rows.is_free | is_finite,
      ),
      kv_cache,
  )


def _keys(rows: Rows, sampler: sampling_config.SamplingConfig) -> Array:
  """Of the first row of a batch of one, by each row's own count of draws."""
  key = jax.random.key(sampler.seed)
  of_row = lambda count: sampling.row_keys(jax.random.fold_in(key, count), 1)[0]
  return jax.vmap(of_row)(rows.num_new)
