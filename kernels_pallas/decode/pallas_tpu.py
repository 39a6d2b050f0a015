"""A decode step on a TPU, in one pass over the cache, which stays where it is.

A step of the grid is a chunk of the slots of a sequence, of all its heads:

  1. At the first chunk the slots are chosen: scores and positions, which are
     small, are in VMEM before keys are needed. The softmax starts from the new
     token.
  2. Logits of a chunk join the softmax (m, l, acc) as usual, and are kept. So
     are the rows around each slot, from the chunk that has them.
  3. At the last chunk m and l are final: the kept logits become weights, heads
     that share a key are joined, and the scores are written. The rows around
     each slot go back with the new one among them.

What lay in the slot is masked, so that it does not matter whether it has been
written yet. The cache is one operand, aliased with its output: a second operand
of the same array would make XLA copy it.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import interpret
from kernels_pallas.decode import rule as rule_lib
from kernels_pallas.decode import slots as slots_lib
from kernels_pallas.decode import tpu_config
from kernels_pallas.decode import tpu_refs
from kernels_pallas.decode import tpu_step
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import tpu_tile
from kernels_pallas.hardware import types as hw_types
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

# What `api` looks for.
Config = tpu_config.Config
_LANES = tpu_layout.LANES


def step(
    token: slots_lib.Token, cache: slots_lib.Slots, rule: rule_lib.Rule
) -> slots_lib.Stepped:
  """Computes the op, see `reference`.

  Raises:
    ValueError: If a TPU has no such type, or the sizes do not fit.
  """
  query, key, value, positions = token
  exported.check_batch("decode_step", query)
  sizes = tpu_config.sizes_of(query, cache)
  chunk = tpu_config.choose_chunk(rule.config or tpu_config.Config(), sizes)
  tpu_config.check_vmem(chunk, sizes)
  # Small arrays of a sequence come whole, keys and values chunk by chunk.
  operands = [query, key, value]
  specs = [tpu_step.by_sequence(x) for x in operands]
  small = cache.small
  rows = pl.BlockSpec(
      (1, sizes.num_kv_heads, chunk, sizes.head_dim),
      lambda b, c, _: (b, 0, c, 0),
  )
  operands += [*small.values(), cache.key, cache.value]
  specs += [*map(tpu_step.by_sequence, small.values()), rows, rows]
  # Stored keys and values are outputs that stay in HBM: only the rows around
  # the slots are written, by copies of the kernel's own.
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  slot = manual_axes.struct((sizes.batch, 1, sizes.num_kv_heads), jnp.int32)
  outputs = [query, slot, *small.values(), cache.key, cache.value]
  out, slot, *new = pl.pallas_call(
      functools.partial(_kernel, rule, sizes, tuple(small)),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(sizes.batch, sizes.capacity // chunk),
          in_specs=specs,
          out_specs=[
              tpu_step.by_sequence(query),
              tpu_step.by_sequence(slot, memory_space=pltpu.SMEM),
              *map(tpu_step.by_sequence, small.values()),
              anywhere,
              anywhere,
          ],
          scratch_shapes=tpu_refs.scratch_of(sizes, cache.key.dtype),
      ),
      out_shape=[manual_axes.struct(x.shape, x.dtype) for x in outputs],
      # Operands are counted from the positions on.
      input_output_aliases={4 + i: 2 + i for i in range(len(small) + 2)},
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=tpu_config.limit(),
          # Blocks are of the grid and slots are within the cache, whatever the
          # scores; checks would be a third of all instructions.
          disable_bounds_checks=True,
      ),
      cost_estimate=tpu_config.cost_estimate(sizes),
      interpret=interpret.mode(),
      name="heavy_hitter_decode",
  )(positions, *operands)
  names = (*small, "key", "value")
  cache = slots_lib.Slots(**dict(zip(names, new, strict=True)))
  return out, cache, slot[:, 0]


def _kernel(
    rule: rule_lib.Rule,
    sizes: tpu_config.Sizes,
    names: tuple[str, ...],
    positions: hw_types.Ref,
    *given: hw_types.Ref,
) -> None:
  rest = iter(given)
  take = lambda num: [next(rest) for _ in range(num)]
  refs = tpu_refs.Refs(
      positions=positions,
      vectors=take(3),
      small=dict(zip(names, take(len(names)), strict=True)),
      stored=take(2),
      out=next(rest),
      slot=next(rest),
      new_small=dict(zip(names, take(len(names)), strict=True)),
      new_stored=take(2),
      scratch=tpu_refs.Scratch(*take(8)),
  )
  sequence, index = pl.program_id(0), pl.program_id(1)
  position = positions[sequence]
  num_chunks = sizes.capacity // refs.stored[0].shape[2]
  # A single chunk is one block of code, which the compiler can interleave.
  at = lambda step: (
      pl.when(index == step) if num_chunks > 1 else lambda body: body()
  )

  @pl.when(position >= 0)
  def _():
    @at(0)
    def _():
      _choose(rule, sizes, refs, position)
      _start(rule, sizes, refs)

    _keep(sizes, refs, index)
    _visit(rule, sizes, refs, position, index)

    @at(num_chunks - 1)
    def _():
      _merge(sizes, refs)
      _start_writes(sizes, refs, sequence)
      _finish(rule, sizes, refs, position)
      tpu_step.await_bytes(refs.scratch.tiles.at[0], refs.scratch.writes)

  @pl.when(position < 0)
  def _():
    refs.out[...] = jnp.zeros_like(refs.out)
    for k in range(sizes.num_kv_heads):
      refs.slot[0, 0, k] = -1
    for name in names:
      refs.new_small[name][...] = refs.small[name][...]


def _choose(
    rule: rule_lib.Rule,
    sizes: tpu_config.Sizes,
    refs: tpu_refs.Refs,
    position: jax.Array,
) -> None:
  """Slots, as vectors and as scalars."""
  score, pos = refs.small["score"][0], refs.small["pos"][0]
  # Chosen from all slots at once, before the first chunk of keys is needed.
  order = rule_lib.order(score, pos, position, rule)
  slot, first = tpu_step.first_of_least(order, sizes.capacity)
  refs.scratch.slot[...] = jnp.broadcast_to(slot, refs.scratch.slot.shape)
  for k in range(sizes.num_kv_heads):
    refs.slot[0, 0, k] = jnp.min(first[k : k + 1]).astype(jnp.int32)


def _start(
    rule: rule_lib.Rule, sizes: tpu_config.Sizes, refs: tpu_refs.Refs
) -> None:
  """The softmax of the new token alone."""
  query, key, value = (x[0].astype(jnp.float32) for x in refs.vectors)
  key, value = (tpu_step.as_read(x, refs.stored_type) for x in (key, value))
  scratch = refs.scratch
  for k in range(sizes.num_kv_heads):
    heads = tpu_refs.heads_of(sizes, k)
    logit = (query[heads] * key[k : k + 1]).sum(axis=1, keepdims=True)
    logit = rule_lib.capped(rule.scale * logit, rule)
    shape = (sizes.num_groups, _LANES)
    scratch.new_logit[heads] = jnp.broadcast_to(logit, shape)
    scratch.highest[heads] = jnp.broadcast_to(logit, shape)
    scratch.acc[heads] = jnp.broadcast_to(
        value[k : k + 1], (sizes.num_groups, sizes.head_dim)
    )
  # Of a single token the maximum is its logit, and its weight 1.
  scratch.total[...] = jnp.ones_like(scratch.total)


def _keep(
    sizes: tpu_config.Sizes, refs: tpu_refs.Refs, index: jax.Array
) -> None:
  """Keeps the rows around each slot if this chunk has them."""
  rows, chunk = sizes.tile_rows, refs.stored[0].shape[2]
  for k in range(sizes.num_kv_heads):
    near = refs.slot[0, 0, k] - index * chunk
    # Without a branch: a chunk that lacks the slot writes rows that nobody
    # reads.
    is_elsewhere = jnp.where((near >= 0) & (near < chunk), 0, 1)
    first = jnp.clip(near, 0, chunk - 1) & -rows
    for i, stored in enumerate(refs.stored):
      kept = stored[0, k, pl.ds(pl.multiple_of(first, rows), rows)]
      refs.scratch.tiles[is_elsewhere, i, k] = kept


def _visit(
    rule: rule_lib.Rule,
    sizes: tpu_config.Sizes,
    refs: tpu_refs.Refs,
    position: jax.Array,
    index: jax.Array,
) -> None:
  """Takes a chunk into the softmax."""
  scratch, chunk = refs.scratch, refs.stored[0].shape[2]
  lanes = tpu_refs.lanes_of(sizes, index, chunk)
  pos = refs.small["pos"][0, :, lanes]
  column = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 1) + index * chunk
  slot = scratch.slot[:, :1].astype(jnp.int32)
  # The slot still holds what is evicted; the new token was counted at the
  # start.
  is_seen = rule_lib.sees(pos, position, rule) & (column != slot)
  query, dtype = refs.vectors[0][0].astype(jnp.float32), refs.product_type
  scaled = lambda x, name: (
      x * refs.small[name][0, :, lanes] if name in refs.small else x
  )
  # Scales of int8 multiply logits, one number a slot, never rows of H.
  factor = scaled(jnp.full(pos.shape, rule.scale), "key_scale")
  for k in range(sizes.num_kv_heads):
    heads, row = tpu_refs.heads_of(sizes, k), slice(k, k + 1)
    keys = refs.stored[0][0, k]
    logits = tpu_step.logits_of(query[heads], keys, factor[row], rule, dtype)
    scratch.logits[heads, lanes] = jnp.where(
        is_seen[row], logits, tpu_tile.FORBIDDEN
    )
  logits = scratch.logits[:, lanes]
  # What was summed before this chunk is corrected once for all heads.
  before = scratch.highest[:, :1]
  highest = jnp.maximum(before, logits.max(axis=1, keepdims=True))
  correction = jnp.exp(before - highest)
  weights = jnp.exp(logits - highest)
  total = correction * scratch.total[:, :1] + weights.sum(axis=1, keepdims=True)
  scratch.highest[...] = jnp.broadcast_to(highest, scratch.highest.shape)
  scratch.total[...] = jnp.broadcast_to(total, scratch.total.shape)
  value_scale = scaled(jnp.ones(pos.shape), "value_scale")
  for k in range(sizes.num_kv_heads):
    heads = tpu_refs.heads_of(sizes, k)
    shares = weights[heads]
    if "value_scale" in refs.small:
      shares = shares * value_scale[k : k + 1]
    added = tpu_step.weighted(shares, refs.stored[1][0, k], dtype)
    scratch.acc[heads] = correction[heads] * scratch.acc[heads] + added


def _finish(
    rule: rule_lib.Rule,
    sizes: tpu_config.Sizes,
    refs: tpu_refs.Refs,
    position: Array,
) -> None:
  """Out, and what was kept of the tokens, chunk by chunk."""
  scratch = refs.scratch
  inverse = 1 / scratch.total[:, :1]
  refs.out[0] = (scratch.acc[...] * inverse).astype(refs.out.dtype)
  highest = scratch.highest[:, :1]
  weights_of = lambda logits: jnp.exp(logits - highest) * inverse
  of_new = _joined(rule, sizes, weights_of(scratch.new_logit[:, :1]))
  # Everything of the new token is put in place by a select over lanes: lanes
  # cannot be written one by one.
  entering = _entering(rule, refs, position)
  num_seen = _num_seen(rule, refs, position)
  slot = scratch.slot[:, :1].astype(jnp.int32)
  chunk = refs.stored[0].shape[2]

  @pl.loop(0, sizes.capacity // chunk)
  def _(index: jax.Array):
    lanes = tpu_refs.lanes_of(sizes, index, chunk)
    shape = (sizes.num_kv_heads, chunk)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) + index * chunk
    is_slot = column == slot
    # As if the new token had been in its slot all along.
    now = {
        name: jnp.where(is_slot, entering[name], ref[0, :, lanes])
        for name, ref in refs.small.items()
    }
    if not rule.keeps_scores:
      mass = _joined(rule, sizes, weights_of(scratch.logits[:, lanes]))
      mass = jnp.where(is_slot, of_new, mass)
      if num_seen is None:
        now["score"] = rule_lib.rescored(now["score"], mass, rule)
      else:
        is_above = mass * num_seen > 1
        now["votes"] = rule_lib.voted(now["votes"], is_above, rule)
        now["score"] = rule_lib.count(now["votes"])
    for name, ref in refs.new_small.items():
      ref[0, :, lanes] = now[name]


def _entering(
    rule: rule_lib.Rule, refs: tpu_refs.Refs, position: Array
) -> dict[str, Array | int]:
  """What a new token comes with, a number or [K, 1], by name."""
  key, value = (row[0] for row in refs.vectors[1:])
  entering = {"pos": position, "votes": 0}
  entering["score"] = rule_lib.entering(key, rule)[:, None]
  for name, row in (("key_scale", key), ("value_scale", value)):
    if name in refs.small:
      entering[name] = slots_lib.quantize(row)[1][:, None]
  return entering


def _num_seen(
    rule: rule_lib.Rule, refs: tpu_refs.Refs, position: Array
) -> Float[Array, "K 1"] | None:
  """How many tokens a key head saw, the new one among them, for its votes."""
  if rule.score != "votes":
    return None
  pos = refs.small["pos"][0]
  column = jax.lax.broadcasted_iota(jnp.int32, pos.shape, 1)
  # What lay in the slot was not seen.
  slot = refs.scratch.slot[:, :1].astype(jnp.int32)
  is_seen = rule_lib.sees(pos, position, rule) & (column != slot)
  return is_seen.astype(jnp.float32).sum(axis=1, keepdims=True) + 1


def _joined(
    rule: rule_lib.Rule, sizes: tpu_config.Sizes, weights: Float[Array, "N _"]
) -> Float[Array, "K _"]:
  """Of query heads what `reduce` makes of them for each key head."""
  if rule.reduce == "layer":
    mean = weights.mean(axis=0, keepdims=True)
    return jnp.broadcast_to(mean, (sizes.num_kv_heads, weights.shape[1]))
  if sizes.num_groups == 1:
    return weights
  parts = [
      weights[tpu_refs.heads_of(sizes, k)] for k in range(sizes.num_kv_heads)
  ]
  return jnp.concatenate([tpu_step.joined(part, rule) for part in parts])


def _merge(sizes: tpu_config.Sizes, refs: tpu_refs.Refs) -> None:
  """Puts the new rows among those around their slots."""
  tiles = refs.scratch.tiles.at[0]
  for i, vectors in enumerate(refs.vectors[1:]):
    rows, _ = tpu_step.as_stored(vectors[0], refs.stored_type)
    for k in range(sizes.num_kv_heads):
      at = refs.slot[0, 0, k] & (sizes.tile_rows - 1)
      tiles[i, k] = tpu_step.replaced(tiles[i, k], rows[k : k + 1], at)


def _start_writes(
    sizes: tpu_config.Sizes, refs: tpu_refs.Refs, sequence: jax.Array
) -> None:
  """Sends them back."""
  # Memory moves whole tiles of rows, so the row's neighbours go back with it.
  rows = sizes.tile_rows
  for k in range(sizes.num_kv_heads):
    first = pl.multiple_of(refs.slot[0, 0, k] & -rows, rows)
    for i, stored in enumerate(refs.new_stored):
      near = refs.scratch.tiles.at[0, i, k]
      far = stored.at[sequence, k, pl.ds(first, rows)]
      pltpu.make_async_copy(near, far, refs.scratch.writes).start()
