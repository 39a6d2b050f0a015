"""Times selections of single queries on a CPU: together, and each by itself.

A part of `launch.bench.kernels` for --target=cpu --ops=single. Each query reads
its own block of keys and others drawn at random before it, as those of MoBA
(https://arxiv.org/abs/2502.13189) at their least alike; forward and backward,
float32. Both ways and dense causal attention take turns on the same arrays.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from kernels_pallas import masks
from kernels_pallas import selection
from kernels_pallas.attention import api
from kernels_pallas.attention import shapes
from kernels_pallas.attention.xla import together
from launch.bench import harness
from launch.bench.ops import programs

# Length, blocks that a query reads, keys of a block.
SIZES = (
    (512, 4, 128),
    (1024, 4, 32),
    (2048, 4, 128),
    (2048, 4, 64),
    (4096, 4, 128),
    (2048, 4, 32),
)


def drawn(
    length: int, num_blocks: int, size: int, shape: shapes.Shape
) -> selection.Selection:
  """Each query's own block and others before it, drawn by key head.

  Args:
    length: T.
    num_blocks: That a query reads, its own included.
    size: Keys of a block.
    shape: Whose batch and key heads have lists of their own.
  """
  own = np.arange(length) // size
  blocks = np.arange(-(-length // size))
  heads = (shape.batch, shape.num_kv_heads, length, len(blocks))
  scores = np.random.default_rng(0).random(heads, np.float32)
  scores = np.where(blocks < own[:, None], scores, -1.0)
  scores = np.where(blocks == own[:, None], 2.0, scores)
  width = min(num_blocks, len(blocks))
  table = np.argsort(-scores, axis=-1)[..., :width].astype(np.int32)
  num_valid = np.broadcast_to(np.minimum(own + 1, width), heads[:3])
  listed = jnp.asarray(table), jnp.asarray(num_valid, jnp.int32)
  return selection.Selection(*listed, masks.causal(length), 1, size)


def report(
    sizes: Sequence[tuple[int, int, int]] = SIZES, num_rounds: int = 5
) -> Iterator[harness.Row]:
  """Yields a row a size: seconds, and ratios of medians.

  Args:
    sizes: T, blocks that a query reads and keys of a block.
    num_rounds: Rounds of turns that count.
  """
  for length, num_blocks, size in sizes:
    shape = dataclasses.replace(shapes.square(length, 8, 2, 64), batch=2)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = shape.arrays("float32")
    draw = lambda key, x: jax.random.normal(key, x.shape)
    given = tuple(map(draw, keys, (*arrays, arrays[0])))
    where = drawn(length, num_blocks, size, shape)
    calls = {
        "together": _compiled(where, given, together.MOST_TILES),
        "each": _compiled(where, given, 0),
        "dense": _compiled(masks.causal(length), given, 0),
    }
    turns = {
        name: functools.partial(_turn, call, given)
        for name, call in calls.items()
    }
    times = harness.take_turns(turns, num_rounds)
    yield {
        "what": "single queries, forward + backward",
        "length": length,
        "blocks": f"{num_blocks} x {size}",
        **{f"{name}_s": float(np.median(x)) for name, x in times.items()},
        "each_of_together": harness.ratio(times["each"], times["together"]),
        "together_of_dense": harness.ratio(times["together"], times["dense"]),
    }


def _turn(call: Callable[..., Any], arrays: Sequence[jax.Array]) -> None:
  jax.block_until_ready(call(*arrays))


def _compiled(
    where: masks.Mask | selection.Selection,
    arrays: Sequence[Float[Array, "..."]],
    most_tiles: int,
) -> Callable[..., Any]:
  """Gradients, where so many times more tiles are read together at most."""
  attend = functools.partial(api.attention, implementation="xla")
  run = lambda *given: attend(*given, where=where).out
  with mock.patch.object(together, "MOST_TILES", most_tiles):
    return jax.jit(programs.with_backward(run)).lower(*arrays).compile()
