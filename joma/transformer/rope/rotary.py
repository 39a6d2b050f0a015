"""Rotary positions: frequencies of every published kind, and the rotation.

A head of which d numbers are rotated has d / 2 pairs. Pair j of a query or key
at position m is turned by the angle m theta_j, theta_j = b^(-2 j / d)
(https://arxiv.org/abs/2104.09864), so that scores depend on distances only.
To read more than the L positions of training, by a factor s:

  linear    theta_j / s: position interpolation, https://arxiv.org/abs/2306.15595
  ntk       base b s^(d / (d - 2)): the first frequency stays, the last is
            divided by s ("NTK-aware")
  dynamic   the same with s -> s T / L - (s - 1) for texts of T > L positions
  yarn      theta_j / s for pairs that turn less than beta_slow times over L,
            theta_j for more than beta_fast times, a linear ramp in j between;
            cos and sin times 0.1 ln s + 1; https://arxiv.org/abs/2309.00071
  longrope  theta_j / lambda_j, given numbers lambda_j, one set up to L and one
            beyond; cos and sin times sqrt(1 + ln s / ln L);
            https://arxiv.org/abs/2402.13753
  llama3    theta_j / s for wavelengths above L / low_freq_factor, theta_j for
            those below L / high_freq_factor, between them a blend that is
            linear in the number of turns over L; https://arxiv.org/abs/2407.21783

Letters: B batch, T positions, N heads, H size of a head, R = d / 2 pairs.
"""

from collections.abc import Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from joma.transformer import config as configs
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment import errors


def frequencies(
    config: rope_config.RopeConfig | Mapping[str, Any],
    rotary_dim: int,
    max_len: int,
    seq_len: int | Int[Array, ""] | None = None,
) -> tuple[Float[Array, "R"], float]:
  """Returns the angle per position of each pair, and the factor of cos and sin.

  The kinds dynamic and longrope depend on the length T of the text that is
  read, the others do not. `seq_len` as an int is static: under jit, another
  length is another compilation; as an array it may be traced. Keys that were
  rotated and cached at one length do not fit queries of another.

  Args:
    config: The kind, or Hugging Face's dictionary (see `rope_config.from_hf`).
    rotary_dim: d, even: how many numbers of each head are rotated.
    max_len: Positions that the model was made for: L of `dynamic`, L of the
      others where they name none, and s L of yarn and longrope without factor.
    seq_len: T; None is L.

  Returns:
    (inv_freq, attn_factor): theta_j, in radians a position, float32.

  Raises:
    UserError: If `rotary_dim` is odd or does not fit the config, or if the
      dictionary is none of Hugging Face's.
  """
  if isinstance(config, Mapping):
    config = rope_config.from_hf(config)
  exponents = _exponents(rotary_dim)
  plain = config.rope_theta**-exponents
  stretch = _stretch(config, max_len)
  match config.rope_type:
    case "linear":
      inv_freq = plain / stretch
    case "ntk" | "dynamic":
      if config.rope_type == "dynamic":
        stretch = stretch * _longer(seq_len, max_len) - (stretch - 1)
      power = rope_config.ntk_power(rotary_dim)
      inv_freq = plain * stretch ** (-power * exponents)
    case "yarn":
      inv_freq = _yarn(config, plain, max_len)
    case "longrope":
      divisors = _longrope_divisors(config, len(plain), max_len, seq_len)
      inv_freq = plain / divisors
    case "llama3":
      inv_freq = _llama3(config, plain, max_len)
    case _:
      inv_freq = plain
  return jnp.asarray(inv_freq, jnp.float32), _attn_factor(config, max_len)


def _exponents(rotary_dim: int) -> Float[np.ndarray, "R"]:
  """2 j / d of each pair.

  Raises:
    UserError: If d is not even.
  """
  if rotary_dim < 2 or rotary_dim % 2:
    raise errors.UserError(
        f"rotary positions turn pairs: got rotary_dim={rotary_dim}."
    )
  # Checkpoints were trained with exponents of float32, whose rounding b^x turns
  # into a relative difference of up to 3e-7.
  exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(
      rotary_dim
  )
  return exponents.astype(np.float64)


def rotate(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    inv_freq: Float[Array, "R"] | Float[Array, "B R"],
    attn_factor: float = 1.0,
) -> Float[Array, "B T N H"]:
  """Turns pair (x_j, x_{R + j}), j < R, by the angle position * inv_freq_j.

  Halves are paired, as in Hugging Face's models. Numbers after the first 2 R
  stay as they are (partial rotary positions). Computed in float32.

  Args:
    x: Queries or keys.
    positions: Of the tokens.
    inv_freq: Radians a position, from `frequencies`; its own for each sequence
      where there are two axes.
    attn_factor: Multiplies what is turned.

  Returns:
    The rotated x, of its dtype.
  """
  num_pairs = inv_freq.shape[-1]
  rows = inv_freq.reshape(-1, 1, 1, num_pairs)
  angles = positions.astype(jnp.float32)[:, :, None, None] * rows
  cos, sin = attn_factor * jnp.cos(angles), attn_factor * jnp.sin(angles)
  first, second, rest = jnp.split(x, [num_pairs, 2 * num_pairs], axis=-1)
  a, b = first.astype(jnp.float32), second.astype(jnp.float32)
  # Complex numbers a + i b times exp(i angle), written out.
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def rotate_by(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    rope: rope_config.RopeConfig,
    config: configs.TransformerConfig,
) -> Float[Array, "B T N H"]:
  """Rotates as a model does.

  Kinds that depend on the length of the text take each sequence's last
  position here: values change with it, shapes and compilation do not.

  Args:
    x: Queries or keys.
    positions: Of the tokens; -1 marks padding.
    rope: The kind, which may differ by layer.
    config: The model's, for rotary_dim and max_len.
  """
  of_length = lambda seq_len: frequencies(
      rope, config.rotary_dim, config.max_len, seq_len
  )
  inv_freq, attn_factor = of_length(None)
  if rope.changes_with_length:
    seq_len = positions.max(axis=1) + 1
    inv_freq = jax.vmap(lambda length: of_length(length)[0])(seq_len)
  return rotate(x, positions, inv_freq, attn_factor)


def _stretch(config: rope_config.RopeConfig, max_len: int) -> float:
  """Returns s, from the two lengths where it is not given."""
  if config.factor is not None:
    return config.factor
  return max_len / (config.original_max_len or max_len)


def _longer(
    seq_len: int | Array | None, max_len: int
) -> float | Float[Array, ""]:
  """Returns max(T, L) / L."""
  if seq_len is None or isinstance(seq_len, int):
    return max(seq_len or 0, max_len) / max_len
  return jnp.maximum(seq_len, max_len) / max_len


def _yarn(
    config: rope_config.RopeConfig, plain: np.ndarray, max_len: int
) -> np.ndarray:
  num_pairs = len(plain)
  original = config.original_max_len or max_len

  def pair_that_turns(num_turns: float) -> float:
    # j with L b^(-2 j / d) = 2 pi num_turns, d / 2 = num_pairs.
    turns = original / (2 * math.pi * num_turns)
    return num_pairs * math.log(turns) / math.log(config.rope_theta)

  low = pair_that_turns(config.beta_fast)
  high = pair_that_turns(config.beta_slow)
  if config.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * num_pairs - 1)
  # A step where both ends fall on one pair.
  width = high - low or 1e-3
  ramp = np.clip((np.arange(num_pairs) - low) / width, 0, 1)
  return plain * (1 - ramp) + plain / _stretch(config, max_len) * ramp


def _attn_factor(config: rope_config.RopeConfig, max_len: int) -> float:
  """Of cos and sin; the text's length does not change it."""
  match config.rope_type:
    case "yarn":
      return _yarn_attn_factor(config, _stretch(config, max_len))
    case "longrope":
      return _longrope_attn_factor(config, max_len)
    case _:
      return 1.0


def _yarn_attn_factor(config: rope_config.RopeConfig, stretch: float) -> float:
  if config.attention_factor is not None:
    return config.attention_factor
  log_stretch = math.log(max(stretch, 1.0))
  grown = lambda weight: 0.1 * weight * log_stretch + 1
  if config.mscale and config.mscale_all_dim:
    return grown(config.mscale) / grown(config.mscale_all_dim)
  return grown(1)


def _longrope_divisors(
    config: rope_config.RopeConfig,
    num_pairs: int,
    max_len: int,
    seq_len: int | Array | None,
) -> np.ndarray | Float[Array, "P"]:
  if len(config.short_factor) != num_pairs:
    raise errors.UserError(
        "short_factor and long_factor must have one number for each of the"
        f" {num_pairs} pairs that are rotated, got {len(config.short_factor)}."
    )
  short, long = np.array(config.short_factor), np.array(config.long_factor)
  original = config.original_max_len or max_len
  if seq_len is None or isinstance(seq_len, int):
    return long if (seq_len or 0) > original else short
  return jnp.where(seq_len > original, long, short)


def _longrope_attn_factor(
    config: rope_config.RopeConfig, max_len: int
) -> float:
  if config.attention_factor is not None:
    return config.attention_factor
  stretch = _stretch(config, max_len)
  if stretch <= 1:
    return 1.0
  original = config.original_max_len or max_len
  return math.sqrt(1 + math.log(stretch) / math.log(original))


def _llama3(
    config: rope_config.RopeConfig, plain: np.ndarray, max_len: int
) -> np.ndarray:
  turns = (config.original_max_len or max_len) * plain / (2 * math.pi)
  low, high = config.low_freq_factor, config.high_freq_factor
  kept = np.clip((turns - low) / (high - low), 0, 1)
  return plain * kept + plain / _stretch(config, max_len) * (1 - kept)
