"""Attention that can say what it attends to, in O(T + S) memory.

FlashAttention (https://arxiv.org/abs/2205.14135) with exact column sums: no
one-pass algorithm can have them, see docs/kernels.md. A mask and a selection of
blocks are two ways to say where to look; the op is one.
"""

import importlib
import types
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import output
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.transformations import exported

_ENTRIES = implementations.ENTRIES | {"xla": "xla.entry"}


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K J"],
    *,
    where: differentiable.Where = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    row_weights: Float[Array, "#B #N #T"] | None = None,
    return_lse: bool = False,
    return_col_mass: bool = False,
    col_mass_heads: Literal["query", "kv"] = "query",
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> output.AttentionOutput:
  """Attends with softmax(soft_cap(scale query key^T) + mask) value.

  Differentiable by query, key, value and sink_logits, through `out` and `lse`;
  `where` is constant. Cost is proportional to the tiles that `where` touches.

  Args:
    query: Any float type; logits and sums are float32 (float64 for float64).
    key: K divides N; head n reads key head n // (N / K), never repeated.
    value: As key; its heads may be of another size J, which `out` then has.
      The smaller ones are padded.
    where: A `masks.Mask`; a `selection.Selection` of key blocks per head and
      query block, with a mask inside them; None attends to every key.
    scale: Factor of the logits; None is H ** -0.5.
    logits_soft_cap: c in c tanh(logits / c), before the mask; None is off.
    sink_logits: A learned logit per head that takes part in the softmax and
      has no value.
    row_weights: Weight of each query in `col_mass`; None is 1.
    return_lse: Whether to return the log of the softmax denominator.
    return_col_mass: Whether to return what each key got in all. No gradient
      flows through it.
    col_mass_heads: "kv" adds up the query heads that share a key head.
    debug: Whether to check every entry of a selection's table, see
      `selection.check`. One out of range is otherwise undefined behaviour.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Tile sizes, the `Config` of the implementation; None lets it choose.

  Returns:
    AttentionOutput. Queries without a key have out 0 and lse -inf.

  Raises:
    ValueError: If shapes, types or options do not fit together, the
      implementation is unknown or not for this platform, or a block is out of
      range with `debug`.
  """
  arguments.check_arrays(query, key, value, is_value_alike=False)
  arguments.check_where(where, query, key)
  arguments.check_options(
      query, scale, logits_soft_cap, sink_logits, row_weights, return_col_mass
  )
  if debug and isinstance(where, selection_lib.Selection):
    selection_lib.check(where, query.shape[1], key.shape[1])
  widest = query if query.shape[-1] >= value.shape[-1] else value
  widest = jax.ShapeDtypeStruct(
      (*query.shape[:3], widest.shape[-1]), query.dtype
  )
  area = exported.abstract(where)
  choose = lambda named=None: implementations.choose_for(
      named, module_of, widest, area
  )
  chosen, query = exported.chosen(
      "attention", implementation, choose, ("BTNH", query), ("BSKJ", value)
  )
  arguments.check_config(config, chosen, module_of(chosen))
  if 0 in query.shape or 0 in key.shape:
    chosen, config = "reference", None  # There are no tiles of nothing.
  if isinstance(where, selection_lib.Selection) and chosen != "xla":
    # XLA computes the heads of a group together, kernels one by one.
    where = selection_lib.by_query_head(where, query.shape[2])
  if chosen not in ("reference", "xla"):
    sink_logits, row_weights = map(arguments.narrow, (sink_logits, row_weights))
  value_dim = value.shape[-1]
  spec = differentiable.AttentionSpec(
      scale=query.shape[-1] ** -0.5 if scale is None else scale,
      logits_soft_cap=logits_soft_cap,
      return_col_mass=return_col_mass,
      config=config,
  )
  # Zeros change no product of queries and keys, and are cut off of values.
  size = max(query.shape[-1], value_dim)
  query, key, value = (_widen(x, size) for x in (query, key, value))
  result = differentiable.attend(
      module_of(chosen),
      differentiable.Inputs(query, key, value, where, sink_logits, row_weights),
      spec,
  )
  result = result._replace(out=result.out[..., :value_dim])
  return output.finish(result, key.shape[2], return_lse, col_mass_heads)


def _widen(x: Float[Array, "B T N H"], size: int) -> jax.Array:
  """Zeros at the end of each head."""
  padding = size - x.shape[-1]
  return jnp.pad(x, [(0, 0)] * 3 + [(0, padding)]) if padding else x


def module_of(
    implementation: implementations.Implementation,
) -> types.ModuleType:
  """Imports on demand: GPU kernels need a newer jax than the others."""
  return importlib.import_module(f"{__package__}.{_ENTRIES[implementation]}")
