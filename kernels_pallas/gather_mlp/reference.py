"""A gathered MLP in plain jnp: the contract of the op.

  y = sum over chosen neurons f of act(x . up_f + b_f) down_f + down_bias
  gated:                           act(x . gate_f + c_f) (x . up_f + b_f) down_f

Every neuron is computed, then those of blocks that were not chosen are dropped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kernels_pallas import activations
from kernels_pallas import implementations
from kernels_pallas.gather_mlp import parts


def forward(given: parts.Given, spec: parts.Spec) -> Float[Array, "B D"]:
  """Computes the op without `down_bias`; differentiable by jax itself."""
  x, weights, plan = given
  is_chosen = chosen(plan, x.shape[0], weights.up.shape[0] // spec.block_size)
  hidden = hidden_of(x, weights, spec.activation)
  # Computed for all and dropped: the contract is about values, not cost.
  keeps = jnp.repeat(is_chosen, spec.block_size, axis=1)
  hidden = jnp.where(keeps, hidden, 0)
  return read(hidden, weights.down)


def hidden_of(
    x: Float[Array, "B D"], weights: parts.Weights, activation: str
) -> Float[Array, "B F"]:
  """What the neurons of `weights` give to their rows of `down`."""
  hidden = _affine(x, weights.up, weights.up_bias)
  if weights.gate is None:
    return activations.ACTIVATIONS[activation](hidden)
  gate = _affine(x, weights.gate, weights.gate_bias)
  return activations.ACTIVATIONS[activation](gate) * hidden


def read(
    hidden: Float[Array, "B F"], down: Float[Array, "F D"]
) -> Float[Array, "B D"]:
  """The rows of `down`, each as often as its neuron says."""
  down = down.astype(hidden.dtype)
  return jnp.einsum("BF,FD->BD", hidden, down, precision="highest")


def chosen(
    plan: parts.Plan, batch: int, num_blocks: int
) -> Bool[Array, "B num_blocks"]:
  """Whether a sequence chose a block."""
  counts = jnp.arange(plan.blocks.shape[0]) < plan.num
  counts = counts[None] if plan.member is None else counts[None] & plan.member
  counts = jnp.broadcast_to(counts, (batch, counts.shape[1]))
  return jnp.zeros((batch, num_blocks), bool).at[:, plan.blocks].max(counts)


def _affine(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None
) -> jax.Array:
  dtype = parts.sum_type(x.dtype)
  x, weight = x.astype(dtype), weight.astype(dtype)
  result = jnp.einsum("BD,FD->BF", x, weight, precision="highest")
  return result if bias is None else result + bias.astype(dtype)[None]


def into_heads(
    given: parts.GivenHeads, config: implementations.Config = None
) -> Float[Array, "B U H"]:
  """X times each head of the plan, transposed; in the type of the sums."""
  x, kernel, plan = given
  del config
  dtype = parts.sum_type(x.dtype)
  heads = jnp.take(kernel.astype(dtype), plan.blocks, axis=0)
  return jnp.einsum("BD,UHD->BUH", x.astype(dtype), heads, precision="highest")


def out_of_heads(
    given: parts.GivenHeads, config: implementations.Config = None
) -> Float[Array, "B D"]:
  """The sum over the plan of `heads`, 0 past its number, times its heads."""
  heads, kernel, plan = given
  del config
  dtype = parts.sum_type(heads.dtype)
  kernel = jnp.take(kernel.astype(dtype), plan.blocks, axis=0)
  return jnp.einsum(
      "BUH,UHD->BD", heads.astype(dtype), kernel, precision="highest"
  )
