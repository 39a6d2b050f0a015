"""What a compiled decode step takes out of its cache.

A model of one layer, two sequences, two key heads of size 8.
"""

import functools
from importlib import metadata
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from joma.transformer import config as configs
from joma.transformer import full_cache
from joma.transformer import model as models

# Of compiled programs: name, dimensions, kind and operands.
_INSTRUCTION = re.compile(
    r"%([\w.-]+) = \w+\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)"
)


@functools.cache
def _lowered_step(entry, length):
  config = configs.TransformerConfig(
      vocab_size=17,
      num_layers=1,
      embed_dim=16,
      num_heads=4,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      attention=(entry,) if entry else (),
  )
  model = models.Transformer(config, implementation="reference")
  draw = functools.partial(model.init, jax.random.key(0))
  params = jax.eval_shape(draw, jnp.zeros((1, 2), jnp.int32))["params"]
  params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), params)
  cache = jax.eval_shape(lambda: full_cache.init(model.config, 2, length))
  step = jax.jit(
      lambda tokens, positions, cache: model.apply(
          {"params": params}, tokens, positions=positions, kv_cache=cache
      ),
      donate_argnums=2,
  )
  one = jax.ShapeDtypeStruct((2, 1), jnp.int32)
  return step.lower(one, one, cache)


class Taken(NamedTuple):
  """What a compiled step does with its caches.

  Attributes:
    elements: That gathers and slices take out of them.
    others: Other instructions that have one of them as operand.
    largest: Elements of the largest array that is none of them.
  """

  elements: int
  others: set[str]
  largest: int


def taken(entry, length):
  """After fusion: from the text of the compiled program."""
  # As users compile: without these a scatter and its index are taken apart.
  is_old = metadata.version("jaxlib") < "0.11"  # 0.11 knows no other way.
  options = {"xla_cpu_use_fusion_emitters": True} if is_old else {}
  program = _lowered_step(entry, length).compile(compiler_options=options)
  program = program.as_text()
  size = 2 * 2 * length * 8  # Two sequences, two heads of 8, in any shape.
  shapes, calls = {}, []
  for name, dims, kind, operands in _INSTRUCTION.findall(program):
    shapes[name] = tuple(int(n) for n in dims.split(",") if n)
    calls.append((name, kind, re.findall(r"%([\w.-]+)", operands)))
  elements, others = 0, set()
  for name, kind, operands in calls:
    if any(math.prod(shapes.get(x, ())) == size for x in operands):
      if kind in ("gather", "dynamic-slice"):
        elements += math.prod(shapes[name])
      # A bitcast moves nothing; what is in a fusion is listed on its own.
      elif kind not in ("bitcast", "fusion"):
        others.add(kind)
  rest = [n for x in shapes.values() if (n := math.prod(x)) != size]
  return Taken(elements, others, max(rest))
