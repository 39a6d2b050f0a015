"""An MLP that computes only chosen blocks of neurons.

Letters: B batch, D width, F neurons, S chosen blocks. A decoding step reads
every weight of an MLP once, and little else: what is not read is not waited
for. Contextual sparsity (Deja Vu, https://arxiv.org/abs/2310.17157) predicts
which neurons matter for the token at hand.
"""

import importlib
import types

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from kernels_pallas import activation_names
from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.gather_mlp import checks
from kernels_pallas.gather_mlp import differentiable
from kernels_pallas.gather_mlp import parts
from kernels_pallas.transformations import exported


def gather_mlp(
    x: Float[Array, "B D"],
    up: Float[Array, "F D"],
    down: Float[Array, "F D"],
    block_ids: Int[masks.AnyArray, "... S"],
    *,
    gate: Float[Array, "F D"] | None = None,
    up_bias: Float[Array, "F"] | None = None,
    gate_bias: Float[Array, "F"] | None = None,
    down_bias: Float[Array, "D"] | None = None,
    num_valid: Int[masks.AnyArray, "..."] | int | None = None,
    activation: activation_names.Activation = "relu",
    block_size: int = 128,
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
) -> Float[Array, "B D"]:
  """Computes act(x up^T + up_bias) down + down_bias over the chosen neurons.

  With a gate: act(x gate^T + gate_bias) * (x up^T + up_bias), SwiGLU for
  "silu". Differentiable by x, weights and biases; gradients of blocks that
  nobody chose are exactly 0. Block i is neurons i block_size to (i + 1)
  block_size - 1: as weights have a row a neuron, one piece of memory each.

  With implementation "xla", all blocks, in whatever order they are listed,
  equal the dense MLP bit by bit: it is computed then, see `xla.dense`.

  Args:
    x: Any float type; sums are float32 (float64 for float64).
    up: Transposed, if you come from x @ kernel; in the type of x.
    down: In the type of x.
    block_ids: [S] for all sequences, or [B, S], a list for each: the kernels
      read the union of the lists, each block once. No block twice in a list.
    gate: As up; None for an MLP without.
    up_bias: None is 0.
    gate_bias: None is 0.
    down_bias: None is 0.
    num_valid: How many entries of a list count, [] or [B]; None is all. Those
      after are not read and cost nothing.
    activation: "relu", "silu", "gelu", "gelu_tanh", "quadratic" or "identity".
    block_size: Neurons of a block, a divisor of F.
    debug: Whether to check every entry that counts, see `checks.check_values`.
      One that is out of range is otherwise undefined behaviour.
    implementation: None is the best of the platform; a named one raises where
      it cannot run.
    config: Sizes, the `Config` of the implementation; None lets it choose.

  Returns:
    y in the type of x.

  Raises:
    ValueError: If shapes, types or options do not fit together, the
      implementation is unknown or not for this platform, or a block is out of
      range with `debug`.
  """
  weights = parts.Weights(up, down, gate, up_bias, gate_bias)
  checks.check_weights(x, weights, down_bias)
  checks.check_options(activation, block_size, up.shape[0])
  checks.check_ids("block_ids", block_ids, num_valid, x.shape[0])
  num_blocks = up.shape[0] // block_size
  if debug:
    checks.check_values("block_ids", block_ids, num_valid, num_blocks, "blocks")
  workload = (exported.abstract(x), block_size, x.shape[1])
  choose = lambda named=None: implementations.choose_for(
      named, module_of, *workload
  )
  chosen, x = exported.chosen("gather_mlp", implementation, choose, ("BD", x))
  module = module_of(chosen)
  if chosen not in ("reference", "xla"):
    up_bias, gate_bias = map(arguments.narrow, (up_bias, gate_bias))
    weights = weights._replace(up_bias=up_bias, gate_bias=gate_bias)
  arguments.check_config(config, chosen, module)
  dtype = parts.sum_type(x.dtype)
  # Kernels have no grid of nothing.
  if 0 in (*x.shape, *up.shape, *np.shape(block_ids)):
    result = jnp.zeros(x.shape, dtype)
  else:
    plan = parts.plan_of(block_ids, num_valid, num_blocks)
    spec = parts.Spec(
        activation=activation, block_size=int(block_size), config=config
    )
    result = differentiable.apply(module, x, weights, plan, spec)
  if down_bias is not None:
    result += down_bias.astype(dtype)[None]
  return result.astype(x.dtype)


def module_of(
    implementation: implementations.Implementation,
) -> types.ModuleType:
  """Imports on demand: GPU kernels need a newer jax than the others."""
  entry = implementations.ENTRIES[implementation]
  return importlib.import_module(f"{__package__}.{entry}")
