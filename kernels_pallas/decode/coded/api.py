"""Attention of one token to keys and values of which most are in four bits.

Tokens stand in blocks of R: full blocks are coded (`codes`), those of the
newest one, which is not full, are as they came. Nothing leaves.

Letters: B batch, N query heads, K key and value heads, M blocks, R tokens of a
block, H head size.
"""

import importlib
import types

from jaxtyping import Array, Float, Int

from kernels_pallas import implementations
from kernels_pallas.decode.coded import codes


def attend(
    query: Float[Array, "B N H"],
    keys: codes.Blocks,
    values: codes.Blocks,
    newest_key: Float[Array, "B K R H"],
    newest_value: Float[Array, "B K R H"],
    positions: Int[Array, "B"],
    *,
    scale: float,
    implementation: implementations.Implementation | None = None,
) -> Float[Array, "B N H"]:
  """Attends to the tokens at positions up to the query's own.

  Args:
    query: Rotated.
    keys: Block m has positions m R to m R + R - 1; what is past the last full
      block is any.
    values: Likewise.
    newest_key: Of position p at p modulo R, the query's own among them.
    newest_value: Likewise.
    positions: Of the queries; -1 returns 0.
    scale: Of the logits.
    implementation: `reference`, which is XLA's, `pallas_tpu` or `pallas_gpu`;
      None is the TPU's there, for these sizes, and else XLA's.

  Raises:
    ValueError: If the sizes do not fit, or the implementation is unknown.
  """
  batch, num_heads, head_dim = query.shape
  num_kv_heads, size = newest_key.shape[1:3]
  lead = (batch, keys.data.shape[1], num_kv_heads)
  for name, blocks, wanted in (
      ("keys", keys, (*lead, head_dim // 2, size)),
      ("values", values, (*lead, size // 2, head_dim)),
  ):
    if blocks.data.shape != wanted:
      raise ValueError(
          f"{name} have codes {blocks.data.shape}; of these newest keys they"
          f" must be {wanted}"
      )
  if num_heads % num_kv_heads:
    raise ValueError(
        f"{num_heads} query heads cannot share {num_kv_heads} key heads"
    )
  # Of the GPU's kernel no figure of speed is known: it is taken by name alone.
  best: dict[str, implementations.Implementation] = {}
  if fits_tpu(size, head_dim):
    best["tpu"] = "pallas_tpu"
  chosen = implementations.choose(implementation, best)
  return _module(chosen).attend(
      query, keys, values, newest_key, newest_value, positions, scale
  )


def _module(name: str) -> types.ModuleType:
  """The module of an implementation; XLA's is the reference."""
  name = "reference" if name == "xla" else name
  return importlib.import_module(f"{__package__}.{name}")


def fits_tpu(size: int, head_dim: int) -> bool:
  """Whether blocks and heads are those of the TPU's kernel."""
  return size == 128 and head_dim == 128
