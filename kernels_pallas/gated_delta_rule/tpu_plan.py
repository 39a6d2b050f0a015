"""How the TPU kernels cut a call into steps, and what of VMEM a step takes."""

import dataclasses

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jaxtyping import Array

from kernels_pallas import implementations
from kernels_pallas.gated_delta_rule import operands as operands_lib
from kernels_pallas.hardware import tpu_layout
from kernels_pallas.hardware import types as hw_types

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Sizes.

  Attributes:
    chunk: Positions of a step, a power of 2 of 16 or more.
    heads: Heads of a step at most.
  """

  chunk: int = 64
  heads: int = 4

  def __post_init__(self):
    if self.chunk < 16 or self.chunk & (self.chunk - 1):
      raise ValueError(
          f"chunk={self.chunk} must be a power of 2 of 16 or more, such as 64"
      )
    if self.heads < 1:
      raise ValueError(f"heads={self.heads} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a call is cut into steps.

  Attributes:
    chunk: C.
    heads: Value heads of a step.
    key_heads: Query and key heads of a step.
    num_groups: Value heads that share a key head.
    grid: Sequences, steps over heads, chunks.
    is_reversed: Whether chunks are visited from the last to the first.
  """

  chunk: int
  heads: int
  key_heads: int
  num_groups: int
  grid: tuple[int, int, int]
  is_reversed: bool = False

  @classmethod
  def of(
      cls, operands: operands_lib.Operands, config: implementations.Config
  ) -> "Plan":
    """With a chunk no longer than needed, and as many heads as VMEM takes.

    Raises:
      ValueError: If a TPU has no such type, or one head does not fit.
    """
    config = config or Config()
    query, key, value, log_decay, *_ = operands
    _check_type(query.dtype)
    batch, length, num_heads, value_size = value.shape
    num_groups = num_heads // key.shape[2]
    chunk = min(config.chunk, max(16, 1 << (length - 1).bit_length()))
    need = lambda n: vmem(
        chunk,
        n,
        key.shape[3],
        value_size,
        log_decay.shape[3] > 1,
        query.dtype.itemsize,
    )
    # Of heads that share a key head a step has all, or a part of one.
    counts = [
        n
        for n in range(1, config.heads + 1)
        if num_heads % n == 0 and 0 in (n % num_groups, num_groups % n)
    ]
    fitting = [n for n in counts if sum(need(n).values()) <= limit()]
    if not fitting:
      raise ValueError(_too_much(chunk, key.shape[3], value_size, need(1)))
    heads = max(fitting)
    key_heads = max(heads // num_groups, 1)
    grid = (batch, num_heads // heads, -(-length // chunk))
    return cls(chunk, heads, key_heads, num_groups, grid)

  def block(self, array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """A chunk of an array [B, heads, T, size] or [B, heads, chunks, 1, C]."""
    _, num_chunks = self.grid[1:]
    is_shared = array.shape[1] < self.grid[1] * self.heads
    heads = self.key_heads if is_shared else self.heads
    # Steps that share key heads, if they do.
    shared = max(self.num_groups // self.heads, 1) if is_shared else 1
    is_row = array.ndim == 5
    shape = (1, 1, self.chunk) if is_row else (self.chunk, array.shape[3])

    def index(
        b: hw_types.Index, n: hw_types.Index, c: hw_types.Index
    ) -> tuple[hw_types.Index, ...]:
      c = num_chunks - 1 - c if self.is_reversed else c
      return (b, n // shared, c, 0, 0)[: array.ndim]

    return pl.BlockSpec((1, heads, *shape), index)

  def states(self, array: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
    """States of a step's heads: before each chunk, or one a head."""
    _, num_chunks = self.grid[1:]
    size = array.shape[-2:]

    def index(
        b: hw_types.Index, n: hw_types.Index, c: hw_types.Index
    ) -> tuple[hw_types.Index, ...]:
      c = num_chunks - 1 - c if self.is_reversed else c
      return (b, n, c, 0, 0) if array.ndim == 5 else (b, n, 0, 0)

    chunk = (1,) if array.ndim == 5 else ()
    return pl.BlockSpec((1, self.heads, *chunk, *size), index)


def limit() -> int:
  """Bytes of VMEM that a kernel here may take."""
  return tpu_layout.tpu_info().vmem_capacity_bytes * 15 // 16


def vmem(
    chunk: int,
    heads: int,
    key_size: int,
    value_size: int,
    is_by_channel: bool,
    itemsize: int,
) -> dict[str, int]:
  """Bytes of VMEM that a step takes at most, by what for.

  Of the backward, which takes the most. Blocks are there twice, to be copied
  ahead. What is computed on the way is part of it, as far as registers run out:
  as many arrays of a head as compiled kernels show, twice as many of float32,
  whose products are made of parts.
  """
  lanes = lambda size: tpu_layout.round_up(size, tpu_layout.LANES)
  key, value, square = (
      4 * chunk * lanes(size) for size in (key_size, value_size, chunk)
  )
  state = 4 * tpu_layout.round_up(key_size, 8) * lanes(value_size)
  num_bits = chunk.bit_length() - 1 if is_by_channel else 0
  blocks = (4 + 2 * is_by_channel) * key + 3 * value + 3 * state
  made = (8 + 5 * num_bits) * key + 8 * value + 12 * square + 4 * state
  return {
      "arrays": 2 * heads * blocks,
      "states": heads * state,
      "registers": _MIB + heads * (itemsize // 2) * made,
  }


def _check_type(dtype: jax.typing.DTypeLike) -> None:
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
        f"query, key and value are {dtype}; the TPU kernels take float32 and"
        " bfloat16"
    )


def _too_much(
    chunk: int, key_size: int, value_size: int, need: dict[str, int]
) -> str:
  what = (
      f"chunk={chunk} of one head with key size {key_size} and value size"
      f" {value_size} needs"
  )
  message = tpu_layout.over_vmem(what, need, limit())
  return f"{message}: use a smaller chunk, or implementation='xla'"
