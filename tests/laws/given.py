"""What a layer tells a cache that asks for its input.

Letters: B sequences, T tokens, K key and value heads, H head size.
"""

import dataclasses

from joma.transformer import config as configs
from joma.transformer import hooks


def with_call(options, value, positions):
  """Options with a call whose input is all heads' values, [B, T, K H]."""
  call = hooks.Call(
      config=configs.TransformerConfig(),
      layer=0,
      x=value.reshape(*value.shape[:2], -1),
      positions=positions,
      rotate=lambda x, positions: x,
      options=options,
      params={},
      carry={},
      is_training=False,
      has_cache=True,
  )
  return dataclasses.replace(options, call=call)
