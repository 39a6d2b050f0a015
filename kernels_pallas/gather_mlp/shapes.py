"""Named shapes of MLPs: for tests, benchmarks and tuning alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.gather_mlp import parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Sizes of one call.

  Attributes:
    batch: B, sequences that decode together.
    width: D.
    num_neurons: F, a multiple of `block_size`.
    block_size: Neurons that are chosen together.
    is_gated: Whether there is a gate.
    has_bias: Whether there are biases.
  """

  batch: int
  width: int
  num_neurons: int
  block_size: int = 128
  is_gated: bool = False
  has_bias: bool = False

  @property
  def num_blocks(self) -> int:
    """How many there are to choose from."""
    return self.num_neurons // self.block_size

  @property
  def num_matrices(self) -> int:
    """[F, D] each."""
    return 3 if self.is_gated else 2

  def arrays(
      self, dtype: jax.typing.DTypeLike = jnp.bfloat16
  ) -> tuple[jax.ShapeDtypeStruct, parts.Weights]:
    """Abstract x and weights."""
    array: Any = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    matrix = array(self.num_neurons, self.width)
    vector = array(self.num_neurons)
    return array(self.batch, self.width), parts.Weights(
        up=matrix,
        down=matrix,
        gate=matrix if self.is_gated else None,
        up_bias=vector if self.has_bias else None,
        gate_bias=vector if self.is_gated and self.has_bias else None,
    )


# Small enough to be interpreted: one sequence; a batch and widths that fill no
# tile; SwiGLU with and without biases.
TESTS = {
    "one": Shape(batch=1, width=64, num_neurons=512, has_bias=True),
    "ragged": Shape(batch=5, width=72, num_neurons=320, block_size=32),
    "swiglu": Shape(
        batch=3, width=128, num_neurons=256, block_size=64, is_gated=True
    ),
    "swiglu_bias": Shape(
        batch=17,
        width=40,
        num_neurons=96,
        block_size=16,
        is_gated=True,
        has_bias=True,
    ),
}

# MLPs of models that people run.
BENCHMARKS = {
    "opt_6.7b": Shape(batch=1, width=4096, num_neurons=16_384, has_bias=True),
    "opt_6.7b_b16": Shape(
        batch=16, width=4096, num_neurons=16_384, has_bias=True
    ),
    "llama3_8b": Shape(batch=1, width=4096, num_neurons=14_336, is_gated=True),
    "llama3_8b_b16": Shape(
        batch=16, width=4096, num_neurons=14_336, is_gated=True
    ),
    # Of a model that is small enough to try blocks of each size.
    **{
        f"smollm2_135m_{block}": Shape(
            batch=1,
            width=576,
            num_neurons=1536,
            block_size=block,
            is_gated=True,
        )
        for block in (1, 16, 32, 64, 128)
    },
}
