"""Attentions that `launch.bench.ops.gpu` measures: ours, jax's, cuDNN's.

Functions of query, key and value, all causal; and the inputs that they get.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import masks
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from kernels_pallas.attention.gpu import entry


def forward_peers(mask: masks.Mask) -> dict[str, Callable[..., Any]]:
  """Causal attentions by name; functions of query, key and value.

  Those with "+col_mass" return column sums too. `mask` is the causal one.
  """
  ours = functools.partial(api.attention, where=mask)
  cudnn = entry.Config(forward_by="cudnn")
  peers = {
      "pallas_gpu": functools.partial(ours, implementation="pallas_gpu"),
      "pallas_gpu+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True
      ),
      "cudnn+col_mass": functools.partial(
          ours, implementation="pallas_gpu", return_col_mass=True, config=cudnn
      ),
      "xla": functools.partial(ours, implementation="xla"),
  }
  by_jax = functools.partial(jax.nn.dot_product_attention, is_causal=True)
  return {
      "cudnn": functools.partial(by_jax, implementation="cudnn"),
      **{
          name: functools.partial(arrays_of, call)
          for name, call in peers.items()
      },
      "jax_mosaic": _jax_mosaic,
      "jax_xla": functools.partial(by_jax, implementation="xla"),
  }


def gradient_of(attention: Callable[..., Any]) -> Callable[..., Any]:
  """What training computes of an attention: forward, and three gradients."""

  def loss(query, key, value):
    out = attention(query, key, value)
    out = out if isinstance(out, tuple) else (out,)
    dtype = jnp.promote_types(out[0].dtype, jnp.float32)
    # lse, where there is one, is second; what is after that has no gradient.
    finite = [jnp.where(jnp.isneginf(x), 0.0, x) for x in out[:2]]
    return sum((x.astype(dtype) ** 2).sum() for x in finite)

  return jax.grad(loss, argnums=(0, 1, 2))


def dtype_of(peer: str) -> Any:
  """The type of the inputs: jax's own kernel has float16 alone."""
  return jnp.float16 if peer == "jax_mosaic" else jnp.bfloat16


def inputs(shape: shapes.Shape, dtype: Any, seed: int) -> tuple[Any, ...]:
  """Normal query, key and value of a shape."""
  return tuple(
      normal(3 * seed + i, array.shape, dtype)
      for i, array in enumerate(shape.arrays())
  )


def arrays_of(
    call: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, ...]:
  """Out, and of lse and column sums what there is."""
  return tuple(x for x in call(*arguments, **options) if x is not None)


def relative_error(
    call: Callable[..., Any],
    exact: Callable[..., Any],
    make: Callable[[], Any],
) -> dict[str, Any]:
  """The largest relative error, and in the note that of each output."""
  arguments = make()
  found = jax.tree.leaves(jax.jit(call)(*arguments))
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
    expected = [np.asarray(x) for x in jax.tree.leaves(jax.jit(exact)(*wide))]
  errors = []
  for x, y in zip(found, expected, strict=True):
    is_finite = np.isfinite(y)  # lse is -inf where there is no key.
    difference = np.where(is_finite, np.asarray(x, np.float64) - y, 0.0)
    norm = np.linalg.norm(np.where(is_finite, y, 0.0))
    errors.append(float(np.linalg.norm(difference) / norm))
  note = ", ".join(f"{error:.1e}" for error in errors)
  return {"error": max(errors), "note": note}


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(
    seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16
) -> jax.Array:
  """Normal numbers of a seed."""
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _jax_mosaic(query: Any, key: Any, value: Any) -> Any:
  """Hopper attention as shipped with jax: no scale, and no causal backward."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
  )
  scale = np.asarray(query.shape[-1] ** -0.5, query.dtype)
  return attention_mgpu.attention(query * scale, key, value, config)
