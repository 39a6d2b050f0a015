"""Numbers that mixers keep of a sequence, in the place of keys and values.

Letters: L layers.
"""

import functools
import math

from joma.systems import names
from joma.transformer import config as configs


@functools.cache
def numbers(config: configs.TransformerConfig) -> dict[int, int]:
  """Returns how many numbers a sequence's state has, by its layer.

  Args:
    config: The model's; layers without a mixer are left out.
  """
  if not any(map(names.parts, config.attention)):
    return {}
  # A mixer is asked for its own empty state, which takes jax.
  import jax

  from joma.transformer import layer_hooks

  found = {}
  for layer in range(config.num_layers):
    mixer = layer_hooks.of_layer(config, layer).mixer
    if mixer is not None:
      make = functools.partial(
          mixer.init_cache, config, layer, 1, config.max_len, "float32"
      )
      leaves = jax.tree.leaves(jax.eval_shape(make))
      found[layer] = sum(math.prod(leaf.shape) for leaf in leaves)
  return found
