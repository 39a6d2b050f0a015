"""Few sizes for texts of any length, so that few programs are compiled.

Arrays whose size follows a text are made larger, up to the next of these sizes;
masks and positions tell what is a token. Imports no jax.
"""

from joma.transformer import config as configs

# Positions of a cache that keeps everything: 8,192 and some that are generated.
_CAPACITIES = (512, 2304, 9216)
# Tokens of texts that are read at once.
_LENGTHS = (128, 512, 1536, 4096, 8192)
# Where whole maps of attention are looked at, which grow with the square.
_WINDOWS = (128, 256, 512, 1024, 2048, 4096, 8192)


def capacity(num_positions: int, config: configs.TransformerConfig) -> int:
  """Returns the positions of a cache for texts of up to `num_positions`."""
  return _bounded(num_positions, _CAPACITIES, config)


def length(num_tokens: int, config: configs.TransformerConfig) -> int:
  """Returns the tokens to which texts of up to `num_tokens` are padded."""
  return _bounded(num_tokens, _LENGTHS, config)


def window(num_tokens: int, config: configs.TransformerConfig) -> int:
  """Returns the tokens of a window that holds a whole text."""
  return _bounded(num_tokens, _WINDOWS, config)


def piece(capacity: int) -> int:
  """Returns how many tokens a cache of that capacity reads at a time.

  An eighth of a small cache: few programs serve it, and little is padding.
  """
  return min(512, max(64, capacity // 8), capacity)


def _bounded(
    needed: int, sizes: tuple[int, ...], config: configs.TransformerConfig
) -> int:
  """The next size, or a multiple of the last; not beyond learned positions."""
  fitting = [size for size in sizes if size >= needed]
  size = fitting[0] if fitting else -(-needed // sizes[-1]) * sizes[-1]
  if config.positions == "learned":
    size = min(size, max(config.max_len, needed))
  return size
