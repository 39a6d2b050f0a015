"""Settings of rotary positions, and Hugging Face's dictionaries of them.

The frequencies themselves are in `rope`, which gives each kind's formula and
source. Imports no jax.
"""

import collections
from collections.abc import Mapping
import dataclasses
import sys
from typing import Any, Literal, get_args

from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

RopeType = Literal[
    "default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"
]

# The fields that each kind reads besides rope_theta.
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_len",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_len",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
    "llama3": (
        "factor",
        "original_max_len",
        "low_freq_factor",
        "high_freq_factor",
    ),
}
_REQUIRED = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor",),
}
# What transformers wants spelled out, be it a default or null.
_WRITTEN = collections.defaultdict(
    tuple, yarn=("factor",), llama3=("low_freq_factor", "high_freq_factor")
)
# Hugging Face's names where they differ from ours.
_HF_NAMES = {"original_max_len": "original_max_position_embeddings"}
# Phi-3's first folders call LongRoPE "su".
_HF_TYPES = {"su": "longrope"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Which rotary frequencies.

  Raises UserError where a number is out of range, where a kind lacks what it
  needs, and where a field is set that the kind does not read.

  Attributes:
    rope_type: Kind of scaling.
    rope_theta: Base b of the frequencies b ** (-2 j / d).
    factor: How much the context is stretched, s >= 1: linear, ntk, dynamic,
      llama3; yarn and longrope take max_len / original_max_len for none.
    original_max_len: Positions L before stretching, of yarn, longrope, llama3;
      none is the model's max_len.
    attention_factor: Factor of cos and sin in yarn and longrope; none is each
      paper's choice.
    beta_fast: Pairs that turn more often than this over L stay as they are, in
      yarn.
    beta_slow: Pairs that turn less often than this over L are interpolated, in
      yarn.
    mscale: Weight of ln s in yarn's attention factor, together with
      mscale_all_dim; none is 1 without a denominator.
    mscale_all_dim: Weight of ln s in the denominator of yarn's attention
      factor.
    truncate: Whether yarn's ramp begins and ends at whole pairs.
    low_freq_factor: Wavelengths above L / this are divided by s, in llama3.
    high_freq_factor: Wavelengths below L / this stay as they are, in llama3.
    short_factor: Divisor of each frequency up to L positions, in longrope.
    long_factor: Divisor of each frequency beyond L positions, in longrope.
  """

  rope_type: RopeType = "default"
  rope_theta: float = 10_000.0
  factor: float | None = None
  original_max_len: int | None = None
  attention_factor: float | None = None
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  short_factor: tuple[float, ...] = ()
  long_factor: tuple[float, ...] = ()

  @property
  def changes_with_length(self) -> bool:
    """Whether a longer text turns its first tokens otherwise.

    A cache then keeps keys before rotation: those rotated at one length do not
    fit queries of another.
    """
    return self.rope_type in ("dynamic", "longrope")

  def __post_init__(self):
    if self.rope_type not in get_args(RopeType):
      raise _unknown_type(self.rope_type)
    self._check_fields_of_the_kind()
    self._check_ranges()

  def _check_fields_of_the_kind(self):
    read = ("rope_type", "rope_theta", *_FIELDS[self.rope_type])
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name not in read and value != field.default:
        raise UserError(
            f"{field.name}={value} has no effect with"
            f" rope_type={self.rope_type}, which reads {', '.join(read[1:])}."
        )
    for name in _REQUIRED.get(self.rope_type, ()):
      if getattr(self, name) in (None, ()):
        raise UserError(f"rope_type={self.rope_type} needs {name}.")

  def _check_ranges(self):
    for name in ("rope_theta", "factor", "attention_factor"):
      if getattr(self, name) is not None:
        require.positive(name, getattr(self, name))
    if self.rope_theta <= 1:
      raise UserError(f"rope_theta must be above 1, got {self.rope_theta}.")
    if self.factor is not None and self.factor < 1:
      raise UserError(f"factor must be at least 1, got {self.factor}.")
    if self.original_max_len is not None:
      require.at_least("original_max_len", self.original_max_len, 1)
    self._check_order("beta_slow", "beta_fast")
    self._check_order("low_freq_factor", "high_freq_factor")
    for number in self.short_factor + self.long_factor:
      require.positive("each of short_factor and long_factor", number)
    if len(self.short_factor) != len(self.long_factor):
      raise UserError(
          "short_factor and long_factor must have one number a pair each, got"
          f" {len(self.short_factor)} and {len(self.long_factor)}."
      )

  def _check_order(self, low: str, high: str):
    require.positive(low, getattr(self, low))
    require.positive(high, getattr(self, high))
    if getattr(self, low) >= getattr(self, high):
      raise UserError(
          f"{low} must be below {high}, got {getattr(self, low)} and"
          f" {getattr(self, high)}."
      )

  def to_hf(self, rotary_dim: int | None = None) -> dict[str, Any]:
    """Returns the value of `rope_parameters` in a Hugging Face config.

    Defaults are left out, so that reading it back and writing it again gives
    the same dictionary. Hugging Face has no static NTK-aware kind: what is
    written is plain RoPE at the base b s^(d / (d - 2)) that this kind stands
    for, and reads back as that.

    Args:
      rotary_dim: d, needed for rope_type=ntk only.

    Raises:
      UserError: If the kind is ntk and `rotary_dim` is not given.
    """
    if self.rope_type == "ntk":
      if rotary_dim is None:
        raise UserError("rope_type=ntk is written as a base: give rotary_dim.")
      growth = (self.factor or 1.0) ** ntk_power(rotary_dim)
      return {"rope_theta": self.rope_theta * growth, "rope_type": "default"}
    hf: dict[str, Any] = {
        "rope_theta": self.rope_theta,
        "rope_type": self.rope_type,
    }
    for field in dataclasses.fields(self):
      if field.name in _FIELDS[self.rope_type]:
        value = getattr(self, field.name)
        if value != field.default or field.name in _WRITTEN[self.rope_type]:
          value = list(value) if isinstance(value, tuple) else value
          hf[_HF_NAMES.get(field.name, field.name)] = value
    return dict(sorted(hf.items()))


def from_hf(
    mapping: Mapping[str, Any],
    *,
    layer_type: str | None = None,
    default_theta: float = 10_000.0,
) -> RopeConfig:
  """Reads rotary settings of either generation of Hugging Face's dictionaries.

  transformers 5 writes `rope_parameters: {rope_type, rope_theta, ...}`, earlier
  ones `rope_theta` beside `rope_scaling: {type or rope_type, ...}` or null.
  Where both are there, `rope_scaling` counts, as in transformers. Keys that a
  kind does not read are passed over, as there. How much of a head is rotated
  (`partial_rotary_factor`) is no part of this.

  Args:
    mapping: A whole config.json, or the value of one of the two keys.
    layer_type: Which entry, where `rope_parameters` holds one dictionary per
      kind of layer, such as "full_attention" and "sliding_attention".
    default_theta: Base where the mapping names none.

  Raises:
    UserError: If the kind is unknown, if a key that it needs is missing, if a
      value is no number, or if `layer_type` is needed and is not there.
  """
  rope = _of_layer_type(_rotary_part(mapping), layer_type)
  hf_type = rope.get("rope_type", rope.get("type")) or "default"
  rope_type = _HF_TYPES.get(hf_type, hf_type)
  if rope_type not in _FIELDS:
    raise _unknown_type(hf_type)
  values = {
      name: rope.get(_HF_NAMES.get(name, name)) for name in _FIELDS[rope_type]
  }
  # Phi-3 keeps this number outside, where transformers lets it win.
  outside = mapping.get(_HF_NAMES["original_max_len"])
  if "original_max_len" in values and outside is not None:
    values["original_max_len"] = outside
  for name in _REQUIRED.get(rope_type, ()):
    if values[name] is None:
      raise UserError(f"rope_type={hf_type} needs {name}, got {dict(rope)}.")
  named = (
      rope.get("rope_theta"),
      mapping.get("rope_theta"),
      mapping.get("rotary_emb_base"),  # GPT-NeoX
  )
  values["rope_theta"] = next(
      (theta for theta in named if theta is not None), default_theta
  )
  values = {k: _number(k, v) for k, v in values.items() if v is not None}
  return RopeConfig(rope_type=rope_type, **values)


def ntk_power(rotary_dim: int) -> float:
  """Returns d / (d - 2), the power of s that NTK-aware bases grow by.

  The last of d / 2 frequencies is b^(-(d - 2) / d): the base b s^(d / (d - 2))
  divides it by s, while the first stays 1.

  Args:
    rotary_dim: d.

  Raises:
    UserError: If d is 2, where the first frequency is the last.
  """
  if rotary_dim <= 2:
    raise UserError(
        "NTK-aware scaling keeps the first frequency and stretches the last:"
        f" rotary_dim must be at least 4, got {rotary_dim}."
    )
  return rotary_dim / (rotary_dim - 2)


def _rotary_part(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns what a config.json says of rotary positions, or it itself."""
  if {"rope_scaling", "rope_parameters"} & mapping.keys():
    return mapping.get("rope_scaling") or mapping.get("rope_parameters") or {}
  is_one_entry = {"rope_type", "type"} & mapping.keys()
  is_by_layer = all(v is None or _is_mapping(v) for v in mapping.values())
  return mapping if is_one_entry or is_by_layer else {}


def _of_layer_type(
    rope: Mapping[str, Any], layer_type: str | None
) -> Mapping[str, Any]:
  entries = [name for name, value in rope.items() if _is_mapping(value)]
  if not entries:
    return rope
  if layer_type not in entries:
    raise UserError(
        "rope_parameters differ by kind of layer: layer_type must be one of"
        f" {', '.join(sorted(entries))}, got {layer_type}."
    )
  return rope[layer_type]


def _is_mapping(value: object) -> bool:
  return isinstance(value, Mapping)


def _number(name: str, value: Any) -> Any:
  """Checks a value of a JSON file and gives it the field's type."""
  if name == "truncate":
    if isinstance(value, bool):
      return value
    raise UserError(f"{name} must be true or false, got {value!r}.")
  if name in ("short_factor", "long_factor"):
    if isinstance(value, list | tuple):
      return tuple(_number(f"{name}[{i}]", v) for i, v in enumerate(value))
    raise UserError(f"{name} must be a list of numbers, got {value!r}.")
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not abs(value) <= sys.float_info.max:
    raise UserError(f"{name} must be a number, got {value!r}.")
  if name != "original_max_len":
    return float(value)
  if value != int(value):
    raise UserError(f"{name} must be a whole number, got {value!r}.")
  return int(value)


def _unknown_type(name: object) -> UserError:
  return UserError(
      f"unknown rope_type {name!r}; known are {', '.join(get_args(RopeType))}."
  )
