"""Projections into and out of chosen attention heads.

Letters: B batch, D width, N heads, H head size, S chosen heads, U heads of the
plan. A head of a kernel [N, H, D] is one piece of memory, as a block of neurons
of an MLP is: a step reads the chosen ones, each once. For queries, keys and
values `project_in`, for what attention returns `project_out`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from kernels_pallas import arguments
from kernels_pallas import implementations
from kernels_pallas import masks
from kernels_pallas.gather_mlp import api
from kernels_pallas.gather_mlp import checks
from kernels_pallas.gather_mlp import parts


def project_in(
    x: Float[Array, "B D"],
    kernel: Float[Array, "N H D"],
    head_ids: Int[masks.AnyArray, "... S"],
    *,
    num_valid: Int[masks.AnyArray, "..."] | int | None = None,
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: Any = None,
) -> Float[Array, "B S H"]:
  """Computes x kernel[head]^T for the chosen heads.

  Differentiable by x and kernel; gradients of heads that nobody chose are 0.

  Args:
    x: Any float type; sums are float32 (float64 for float64).
    kernel: In the type of x. Transposed, if yours is [D, N, H].
    head_ids: [S] for all sequences, or [B, S]; no head twice in a list.
    num_valid: How many entries of a list count, [] or [B]; None is all. Those
      after give 0.
    debug: Whether to check every entry that counts.
    implementation: As in `api.gather_mlp`.
    config: As there.

  Returns:
    Of each chosen head, in the order of the list.

  Raises:
    ValueError: As `api.gather_mlp`.
  """
  _check("x", x, ("B", "D"), kernel, head_ids, num_valid, debug)
  module = _module_of(implementation, config, x, kernel)
  shape = (x.shape[0], np.shape(head_ids)[-1], kernel.shape[1])
  if 0 in (*shape, *kernel.shape):
    return jnp.zeros(shape, x.dtype)
  plan = parts.plan_of(head_ids, num_valid, kernel.shape[0])
  by_plan = _into(module, config, x, kernel, plan)
  return _to_lists(by_plan, plan, head_ids, num_valid).astype(x.dtype)


def project_out(
    heads: Float[Array, "B S H"],
    kernel: Float[Array, "N H D"],
    head_ids: Int[masks.AnyArray, "... S"],
    *,
    num_valid: Int[masks.AnyArray, "..."] | int | None = None,
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: Any = None,
) -> Float[Array, "B D"]:
  """Computes the sum over the chosen heads of heads[s] kernel[head_ids[s]].

  Differentiable by heads and kernel; gradients of heads that nobody chose are
  0.

  Args:
    heads: What attention returned for each chosen head.
    kernel: In the type of heads.
    head_ids: As in `project_in`.
    num_valid: As there; entries past it add nothing.
    debug: As there.
    implementation: As there.
    config: As there.

  Raises:
    ValueError: As `api.gather_mlp`.
  """
  _check("heads", heads, ("B", "S", "H"), kernel, head_ids, num_valid, debug)
  module = _module_of(implementation, config, heads, kernel)
  shape = (heads.shape[0], kernel.shape[2])
  if 0 in (*heads.shape, *kernel.shape):
    return jnp.zeros(shape, heads.dtype)
  plan = parts.plan_of(head_ids, num_valid, kernel.shape[0])
  by_plan = _to_plan(heads, plan, head_ids, num_valid)
  return _out_of(module, config, by_plan, kernel, plan).astype(heads.dtype)


def _into(module: Any, config: Any, x: Any, kernel: Any, plan: Any) -> Any:
  """[B, U, H] in the type of the sums; anything past `plan.num`."""
  call = jax.custom_vjp(_into_forward, nondiff_argnums=(0, 1))
  call.defvjp(_into_and_kept, _into_backward)
  return call(module, config, x, kernel, plan)


def _into_forward(module, config, x, kernel, plan):
  return module.into_heads(parts.GivenHeads(x, kernel, plan), config)


def _into_and_kept(module, config, x, kernel, plan):
  return _into_forward(module, config, x, kernel, plan), (x, kernel, plan)


def _into_backward(module, config, kept, d_heads):
  x, kernel, plan = kept
  d_heads = d_heads.astype(x.dtype)
  # Into heads and out of them are each other's transpose.
  d_x = module.out_of_heads(parts.GivenHeads(d_heads, kernel, plan), config)
  return d_x.astype(x.dtype), _d_kernel(d_heads, x, kernel, plan), None


def _out_of(module: Any, config: Any, heads: Any, kernel: Any, plan: Any):
  """[B, D] in the type of the sums, from [B, U, H] that is 0 past `num`."""
  call = jax.custom_vjp(_out_forward, nondiff_argnums=(0, 1))
  call.defvjp(_out_and_kept, _out_backward)
  return call(module, config, heads, kernel, plan)


def _out_forward(module, config, heads, kernel, plan):
  return module.out_of_heads(parts.GivenHeads(heads, kernel, plan), config)


def _out_and_kept(module, config, heads, kernel, plan):
  return _out_forward(module, config, heads, kernel, plan), (
      heads,
      kernel,
      plan,
  )


def _out_backward(module, config, kept, d_out):
  heads, kernel, plan = kept
  d_out = d_out.astype(heads.dtype)
  d_heads = module.into_heads(parts.GivenHeads(d_out, kernel, plan), config)
  return (
      d_heads.astype(heads.dtype),
      _d_kernel(heads, d_out, kernel, plan),
      None,
  )


def _d_kernel(heads: Any, x: Any, kernel: Any, plan: parts.Plan) -> Any:
  """The cotangent of the kernel: a product for each head of the plan."""
  dtype = parts.sum_type(kernel.dtype)
  heads = jnp.where(_counts(plan)[None, :, None], heads, 0)
  products = jnp.einsum(
      "BUH,BD->UHD",
      heads.astype(dtype),
      x.astype(dtype),
      precision="highest",
  ).astype(kernel.dtype)
  # Entries that do not count add 0 to whatever head they name.
  return jnp.zeros_like(kernel).at[plan.blocks].add(products)


def _counts(plan: parts.Plan) -> Any:
  return jnp.arange(plan.blocks.shape[0]) < plan.num


def _place(plan: parts.Plan, head_ids: Any, num_valid: Any) -> Any:
  """Where each entry of the lists [B, S] is in the plan, and which count."""
  ids = jnp.asarray(head_ids, jnp.int32)
  width = ids.shape[-1]
  num = jnp.asarray(width if num_valid is None else num_valid)
  counts = jnp.arange(width)[None] < jnp.broadcast_to(num, len(ids))[:, None]
  is_there = ids[:, :, None] == plan.blocks[None, None]
  is_there &= _counts(plan)[None, None]
  return is_there.argmax(axis=-1), counts


def _to_lists(by_plan: Any, plan: Any, head_ids: Any, num_valid: Any) -> Any:
  """[B, U, H] to [B, S, H], 0 where an entry does not count."""
  if plan.member is None:
    return jnp.where(_counts(plan)[None, :, None], by_plan, 0)
  place, counts = _place(plan, head_ids, num_valid)
  lists = jnp.take_along_axis(by_plan, place[..., None], axis=1)
  return jnp.where(counts[..., None], lists, 0)


def _to_plan(heads: Any, plan: Any, head_ids: Any, num_valid: Any) -> Any:
  """[B, S, H] to [B, U, H], 0 where a sequence did not choose a head."""
  if plan.member is None:
    return jnp.where(_counts(plan)[None, :, None], heads, 0)
  place, counts = _place(plan, head_ids, num_valid)
  heads = jnp.where(counts[..., None], heads, 0)
  row = jnp.broadcast_to(jnp.arange(len(heads))[:, None], place.shape)
  shape = (len(heads), plan.blocks.shape[0], heads.shape[-1])
  return jnp.zeros(shape, heads.dtype).at[row, place].add(heads)


def _module_of(implementation: Any, config: Any, x: Any, kernel: Any) -> Any:
  chosen = implementations.choose_for(
      implementation, api.module_of, x, *kernel.shape[1:]
  )
  module = api.module_of(chosen)
  arguments.check_config(config, chosen, module)
  return module


def _check(name, array, axes, kernel, head_ids, num_valid, debug) -> None:
  """Raises ValueError unless the arrays of a projection fit together."""
  arguments.check_float_array(name, array)
  arguments.check_float_array("kernel", kernel)
  if array.ndim != len(axes) or kernel.ndim != 3:
    raise ValueError(
        f"{name} has shape {array.shape} and kernel {kernel.shape}; they must"
        f" be [{', '.join(axes)}] and [N, H, D]"
    )
  last = kernel.shape[1 if axes[-1] == "H" else 2]
  if array.shape[-1] != last:
    raise ValueError(
        f"{name} {array.shape} and kernel {kernel.shape}, [N, H, D], must have"
        f" equal {axes[-1]}"
    )
  if array.dtype != kernel.dtype:
    raise ValueError(
        f"{name} is {array.dtype} and kernel {kernel.dtype}; they must have one"
        " type"
    )
  checks.check_ids("head_ids", head_ids, num_valid, array.shape[0])
  if "S" in axes and array.shape[1] != np.shape(head_ids)[-1]:
    raise ValueError(
        f"{name} has {array.shape[1]} heads and head_ids {np.shape(head_ids)}"
        " chooses another number"
    )
  if debug:
    checks.check_values(
        "head_ids", head_ids, num_valid, kernel.shape[0], "heads"
    )
