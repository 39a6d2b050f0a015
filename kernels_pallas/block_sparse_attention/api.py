"""Attention to the key blocks that a data-dependent Selection lists.

Letters as in `flash_attention`. Cost is proportional to the listed blocks.
"""

from typing import Any, Literal

from jaxtyping import Array, Float

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import output
from kernels_pallas import selection as selection_lib
from kernels_pallas.attention import differentiable
from kernels_pallas.block_sparse_attention import reference


def block_sparse_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    selection: selection_lib.Selection,
    *,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    sink_logits: Float[Array, "N"] | None = None,
    row_weights: Float[Array, "#B #N #T"] | None = None,
    return_lse: bool = False,
    return_col_mass: bool = False,
    col_mass_heads: Literal["query", "kv"] = "query",
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: Any = None,
) -> output.AttentionOutput:
  """Attends to the selected blocks alone.

  Equal to `flash_attention` where the selection lists every block, and to it
  under the dense mask of the selection otherwise. Differentiable by query, key,
  value and sink_logits, through `out` and `lse`; the selection is constant.

  Args:
    query: Any float type; logits and sums are float32 (float64 for float64).
    key: K divides N; head n reads key head n // (N / K), never repeated.
    value: As key.
    selection: Blocks per head and query block, and a mask inside them.
    scale: Factor of the logits; None is H ** -0.5.
    logits_soft_cap: c in c tanh(logits / c), before the mask; None is off.
    sink_logits: A learned logit per head that has no value.
    row_weights: Weight of each query in `col_mass`; None is 1.
    return_lse: Whether to return the log of the softmax denominator.
    return_col_mass: Whether to return what each key got in all.
    col_mass_heads: "kv" adds up the query heads that share a key head.
    debug: Whether to check every entry of the table, see `selection.check`. An
      entry that is out of range is otherwise undefined behaviour.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Options of the implementation; None lets it choose.

  Returns:
    AttentionOutput. Queries without a key have out 0 and lse -inf.

  Raises:
    ValueError: If shapes, types or options do not fit together, the
      implementation is unknown or not for this platform, or a block is out of
      range with `debug`.
  """
  arguments.check_arrays(query, key, value)
  arguments.check_selection(selection, query, key)
  arguments.check_options(
      query, scale, logits_soft_cap, sink_logits, row_weights, return_col_mass
  )
  if debug:
    selection_lib.check(selection, query.shape[1], key.shape[1])
  chosen = implementations.choose(
      implementation, {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
  )
  if implementation is None and chosen == "pallas_gpu":
    # Hopper's tensor cores have no float32, among other things.
    chosen = "xla" if _module(chosen).why_not(query, selection) else chosen
  arguments.check_config(config, chosen, _module(chosen))
  if 0 in query.shape or 0 in key.shape:
    chosen, config = "reference", None  # There are no tiles of nothing.
  spec = differentiable.AttentionSpec(
      scale=query.shape[-1] ** -0.5 if scale is None else scale,
      logits_soft_cap=logits_soft_cap,
      return_col_mass=return_col_mass,
      config=config,
  )
  result = differentiable.attend(
      _module(chosen),
      query,
      key,
      value,
      selection,
      sink_logits,
      row_weights,
      spec,
  )
  return output.finish(result, key.shape[2], return_lse, col_mass_heads)


def _module(implementation: str) -> Any:
  """Imports on demand: GPU kernels need a newer jax than the others."""
  if implementation == "reference":
    return reference
  if implementation == "xla":
    from kernels_pallas.block_sparse_attention import xla

    return xla
  if implementation == "pallas_tpu":
    from kernels_pallas.block_sparse_attention import pallas_tpu

    return pallas_tpu
  from kernels_pallas.block_sparse_attention import pallas_gpu

  return pallas_gpu
