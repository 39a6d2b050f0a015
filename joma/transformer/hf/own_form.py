"""The project's own config.json, for models that no other family can say.

It has `model_type` "joma" and the fields of the TransformerConfig; tensors have
the names of the parameter tree. `pretrained` reads such folders as others.
Imports no jax.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from joma.transformer.config import TransformerConfig
from joma.transformer.rope.config import RopeConfig
from scansnap_jax.experiment.errors import UserError

MODEL_TYPE = "joma"
# Of config.json, without a meaning for the model.
_OTHERS = (
    "model_type",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def to_fields(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of a config.json; `from_fields` gives `config` again."""
  return {"model_type": MODEL_TYPE, **dataclasses.asdict(config)}


def from_fields(fields: Mapping[str, Any]) -> TransformerConfig:
  """Reads the fields of a config.json; those that are absent are the defaults.

  Raises:
    UserError: If a field is unknown, of another type, or no such model can be.
  """
  known = {name: fields[name] for name in fields if name not in _OTHERS}
  rope = known.pop("rope", {})
  if not isinstance(rope, Mapping):
    raise UserError(f"rope must be a dictionary, got {rope!r}.")
  known = _checked(TransformerConfig, known, "")
  return TransformerConfig(
      **known, rope=RopeConfig(**_checked(RopeConfig, rope, "rope."))
  )


def _checked(kind: Any, values: Mapping[str, Any], where: str) -> Any:
  """Returns values as fields of a class, lists as tuples."""
  defaults = {field.name: field.default for field in dataclasses.fields(kind)}
  for name, value in values.items():
    if name not in defaults:
      raise UserError(f"model_type={MODEL_TYPE} has no field {where}{name}.")
    if not _is_like(value, defaults[name]):
      raise UserError(
          f"{where}{name} must be like {defaults[name]!r}, got {value!r}."
      )
  return {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in values.items()
  }


def _is_like(value: object, default: object) -> bool:
  """Whether JSON's value can be that of a field with this default."""
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if default is None:
    return value is None or is_number
  if isinstance(default, tuple):
    items = value if isinstance(value, list | tuple) else [None]
    return all(isinstance(item, str | int | float) for item in items)
  if isinstance(default, float):
    return is_number
  return type(value) is type(default)
