"""Projections into and out of chosen attention heads.

Letters: B batch, D width, N heads, H head size, S chosen heads, U heads of the
plan. A head of a kernel [N, H, D] is one piece of memory, as a block of neurons
of an MLP is: a step reads the chosen ones, each once. For queries, keys and
values `project_in`, for what attention returns `project_out`.
"""

import types

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
from kernels_pallas.transformations import derivatives
from kernels_pallas.transformations import exported
from kernels_pallas.transformations import manual_axes

_Kept = tuple[jax.Array, jax.Array, parts.Plan]


def project_in(
    x: Float[Array, "B D"],
    kernel: Float[Array, "N H D"],
    head_ids: Int[masks.AnyArray, "... S"],
    *,
    num_valid: Int[masks.AnyArray, "..."] | int | None = None,
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
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
  module, x = _chosen(implementation, config, x, kernel)
  shape = (x.shape[0], np.shape(head_ids)[-1], kernel.shape[1])
  if 0 in (*shape, *kernel.shape):
    return jnp.zeros(shape, x.dtype)
  plan = parts.plan_of(head_ids, num_valid, kernel.shape[0])
  by_plan = _project(module, config, True, x, kernel, plan)
  return _to_lists(by_plan, plan, head_ids, num_valid).astype(x.dtype)


def project_out(
    heads: Float[Array, "B S H"],
    kernel: Float[Array, "N H D"],
    head_ids: Int[masks.AnyArray, "... S"],
    *,
    num_valid: Int[masks.AnyArray, "..."] | int | None = None,
    debug: bool = False,
    implementation: implementations.Implementation | None = None,
    config: implementations.Config = None,
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
  module, heads = _chosen(implementation, config, heads, kernel)
  shape = (heads.shape[0], kernel.shape[2])
  if 0 in (*heads.shape, *kernel.shape):
    return jnp.zeros(shape, heads.dtype)
  plan = parts.plan_of(head_ids, num_valid, kernel.shape[0])
  # The kernels visit the union of all lists, each head once.
  by_plan = _to_plan(heads, plan, head_ids, num_valid)
  return _project(module, config, False, by_plan, kernel, plan).astype(
      heads.dtype
  )


def _project(
    module: types.ModuleType,
    config: implementations.Config,
    is_into: bool,
    rows: jax.Array,
    kernel: jax.Array,
    plan: parts.Plan,
) -> jax.Array:
  """From [B, D] to [B, U, H] if into heads, else back; in the type of sums.

  Of heads past `plan.num`, results are anything, and what is given must be 0.
  """
  rows, kernel, plan = manual_axes.align((rows, kernel, plan))
  call = jax.custom_vjp(_forward, nondiff_argnums=(0, 1, 2))
  call.defvjp(_forward_and_kept, _backward)
  given = (module, config, is_into, rows, kernel, plan)
  return derivatives.reverse_only("a projection of heads", call, *given)


def _forward(
    module: types.ModuleType,
    config: implementations.Config,
    is_into: bool,
    rows: jax.Array,
    kernel: jax.Array,
    plan: parts.Plan,
) -> jax.Array:
  project = module.into_heads if is_into else module.out_of_heads
  run = lambda *given: project(parts.GivenHeads(*given), config)
  op = "a projection of heads"
  return derivatives.run(op, module, run, rows, kernel, plan, is_by_jax=False)


def _forward_and_kept(
    module: types.ModuleType,
    config: implementations.Config,
    is_into: bool,
    rows: jax.Array,
    kernel: jax.Array,
    plan: parts.Plan,
) -> tuple[jax.Array, _Kept]:
  kept = (rows, kernel, plan)
  return _forward(module, config, is_into, *kept), kept


def _backward(
    module: types.ModuleType,
    config: implementations.Config,
    is_into: bool,
    kept: _Kept,
    d_made: jax.Array,
) -> tuple[jax.Array, jax.Array, None]:
  rows, kernel, plan = kept
  d_made = d_made.astype(rows.dtype)
  # Into heads and out of them are each other's transpose.
  d_rows = _forward(module, config, not is_into, d_made, kernel, plan)
  heads, x = (d_made, rows) if is_into else (rows, d_made)
  d_kernel = _d_kernel(heads, x, kernel, plan)
  return d_rows.astype(rows.dtype), d_kernel, None


def _d_kernel(
    heads: jax.Array, x: jax.Array, kernel: jax.Array, plan: parts.Plan
) -> jax.Array:
  """The cotangent of the kernel: a product for each head of the plan."""
  dtype = parts.sum_type(kernel.dtype)
  heads = jnp.where(_counts(plan)[None, :, None], heads, 0)
  # Few sequences: one product a head is small beside reading the kernel.
  products = jnp.einsum(
      "BUH,BD->UHD",
      heads.astype(dtype),
      x.astype(dtype),
      precision="highest",
  ).astype(kernel.dtype)
  # Entries that do not count add 0 to whatever head they name.
  return jnp.zeros_like(kernel).at[plan.blocks].add(products)


def _counts(plan: parts.Plan) -> jax.Array:
  return jnp.arange(plan.blocks.shape[0]) < plan.num


def _place(
    plan: parts.Plan,
    head_ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
) -> tuple[jax.Array, jax.Array]:
  """Where each entry of the lists [B, S] is in the plan, and which count."""
  ids = jnp.asarray(head_ids, jnp.int32)
  width = ids.shape[-1]
  num = jnp.asarray(width if num_valid is None else num_valid)
  counts = jnp.arange(width)[None] < jnp.broadcast_to(num, len(ids))[:, None]
  # Lists are short: comparing all pairs is cheaper than a search.
  is_there = ids[:, :, None] == plan.blocks[None, None]
  is_there &= _counts(plan)[None, None]
  return is_there.argmax(axis=-1), counts


def _to_lists(
    by_plan: jax.Array,
    plan: parts.Plan,
    head_ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
) -> jax.Array:
  """[B, U, H] to [B, S, H], 0 where an entry does not count."""
  if plan.member is None:
    return jnp.where(_counts(plan)[None, :, None], by_plan, 0)
  place, counts = _place(plan, head_ids, num_valid)
  lists = jnp.take_along_axis(by_plan, place[..., None], axis=1)
  return jnp.where(counts[..., None], lists, 0)


def _to_plan(
    heads: jax.Array,
    plan: parts.Plan,
    head_ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
) -> jax.Array:
  """[B, S, H] to [B, U, H], 0 where a sequence did not choose a head."""
  if plan.member is None:
    return jnp.where(_counts(plan)[None, :, None], heads, 0)
  place, counts = _place(plan, head_ids, num_valid)
  heads = jnp.where(counts[..., None], heads, 0)
  row = jnp.broadcast_to(jnp.arange(len(heads))[:, None], place.shape)
  shape = (len(heads), plan.blocks.shape[0], heads.shape[-1])
  return jnp.zeros(shape, heads.dtype).at[row, place].add(heads)


def _chosen(
    implementation: implementations.Implementation | None,
    config: implementations.Config,
    x: jax.Array,
    kernel: jax.Array,
) -> tuple[types.ModuleType, jax.Array]:
  """The implementation, and x, marked."""
  workload = (exported.abstract(x), *kernel.shape[1:])
  choose = lambda named=None: implementations.choose_for(
      named, api.module_of, *workload
  )
  axes = "BD" if x.ndim == 2 else "BSH"
  chosen, x = exported.chosen(
      "a projection of heads", implementation, choose, (axes, x)
  )
  module = api.module_of(chosen)
  arguments.check_config(config, chosen, module)
  return module, x


def _check(
    name: str,
    array: jax.Array,
    axes: tuple[str, ...],
    kernel: jax.Array,
    head_ids: masks.AnyArray,
    num_valid: masks.AnyArray | int | None,
    debug: bool,
) -> None:
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
