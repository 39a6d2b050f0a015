"""config.json of Hugging Face models, to a TransformerConfig and back.

Both generations of the file are read: `rope_parameters` and `dtype` of
transformers 5, and `rope_theta`, `rope_scaling` and `torch_dtype` before it;
both are written, so that old and new readers find what they look for. Whatever
would make another model than the one described by the TransformerConfig is
refused, never passed over. Imports no jax.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, get_type_hints

from joma.transformer.config import TransformerConfig
from joma.transformer.hf import own_form
from joma.transformer.hf.families import FAMILIES
from joma.transformer.hf.families import Family
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

# transformers has several names for one function; the first is written.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu": ("gelu", "gelu_python"),
    "gelu_tanh": (
        "gelu_pytorch_tanh",
        "gelu_new",
        "gelu_fast",
        "gelu_accurate",
        "gelu_python_tanh",
    ),
    "silu": ("silu", "swish"),
    "identity": ("linear",),
}
# Values under which a field of any family changes nothing.
_NEUTRAL = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "rope_interleaved": (None, False),
}
_JSON_TYPES = {
    "true or false": bool,
    "a whole number": int,
    "a number": float,
    "a list": list,
    "a dictionary": Mapping,
}
_FIELDS_OF_TYPE = {
    "true or false": (
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "enable_bias",
        "scale_attn_weights",
        "use_sliding_window",
        "use_parallel_residual",
        "do_layer_norm_before",
        "_remove_final_layer_norm",
    ),
    "a whole number": (
        "sliding_window",
        "sliding_window_pattern",
        "max_window_layers",
        "word_embed_proj_dim",
    ),
    "a number": (
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "rope_local_base_freq",
        "rotary_pct",
    ),
    "a list": ("layer_types",),
    "a dictionary": ("rope_parameters", "rope_scaling"),
}
_OWN_CAN = f"model_type={own_form.MODEL_TYPE}, the project's own form, can"
# Where null is a value; elsewhere it is the default.
_NULLABLE = (
    "sliding_window",
    "word_embed_proj_dim",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "layer_types",
    "rope_parameters",
    "rope_scaling",
)
# They act in training alone, so a family need not be able to say them.
_TRAINING_ONLY = ("dropout", "attn_dropout", "hidden_dropout", "residual_scale")


def from_hf(fields: Mapping[str, Any]) -> TransformerConfig:
  """Reads the fields of a config.json.

  Fields that are absent are what transformers takes them for. Dropout is
  `resid_pdrop` in GPT-2, where the embeddings' may differ.

  Args:
    fields: The file as a dictionary.

  Raises:
    UserError: If model_type is not supported, if a size is missing, if a value
      is not of its type, or if it asks for a model that a TransformerConfig
      cannot describe; the message names field and value.
  """
  model_type = str(fields.get("model_type"))
  if model_type == own_form.MODEL_TYPE:
    return own_form.from_fields(fields)
  if model_type not in FAMILIES:
    raise UserError(
        f"model_type={model_type!r} is not supported; supported:"
        f" {', '.join((*FAMILIES, own_form.MODEL_TYPE))}."
    )
  family = FAMILIES[model_type]
  fields = _checked_types(fields)
  for name in ("rope_parameters", "rope_scaling"):
    _check_rope(name, fields.get(name) or {})
  _check_neutral(fields, {**_NEUTRAL, **family.neutral})
  known = _read_names(fields, family, model_type)
  return TransformerConfig(**{**known, **family.read(fields, known)})


def to_hf(
    config: TransformerConfig, family: str | None = None
) -> dict[str, Any]:
  """Returns the fields of a config.json.

  Reading them gives `config` again, what acts in training alone aside.

  Args:
    config: What to describe.
    family: A model_type; None is the first that can describe `config`, and the
      project's own, joma, for one with attention systems or Monarch matrices.

  Raises:
    UserError: If the family cannot describe `config`; the message names the
      fields that it cannot say.
  """
  if family == own_form.MODEL_TYPE or (family is None and is_own(config)):
    return own_form.to_fields(config)
  if family is None:
    family = family_of(config)
  elif family not in FAMILIES:
    raise UserError(
        f"family={family!r} is not supported; supported: {', '.join(FAMILIES)}."
    )
  if unsaid := _unsaid(config, family):
    values = ", ".join(f"{name}={getattr(config, name)}" for name in unsaid)
    raise UserError(f"model_type={family} cannot say {values}; {_OWN_CAN}.")
  return _write(config, family)


def is_own(config: TransformerConfig) -> bool:
  """Whether the project's own form alone can describe a model."""
  return bool(config.attention) or config.monarch is not None


def family_of(config: TransformerConfig) -> str:
  """Returns the first model_type that can describe a TransformerConfig.

  Raises:
    UserError: If none can; the message names what the nearest one cannot say.
  """
  unsaid = {name: _unsaid(config, name) for name in FAMILIES}
  nearest = min(unsaid, key=lambda name: len(unsaid[name]))
  if unsaid[nearest]:
    values = [f"{name}={getattr(config, name)}" for name in unsaid[nearest]]
    raise UserError(
        "No supported model_type can describe this model; the nearest,"
        f" {nearest}, cannot say {', '.join(values)}; {_OWN_CAN}."
    )
  return nearest


def _checked_types(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `fields` without nulls that mean the default, types checked."""
  checked = dict(fields)
  for kind, names in _FIELDS_OF_TYPE.items():
    for name in names:
      value = fields.get(name)
      if value is None and name not in _NULLABLE:
        checked.pop(name, None)
      elif value is not None and not _is_of(value, _JSON_TYPES[kind]):
        raise UserError(f"{name} must be {kind}, got {value!r}.")
      elif value is not None and kind == "a number":
        require.positive(name, value)
  return checked


def _check_rope(name: str, rope: Mapping[str, Any]) -> None:
  """Checks what `rope_config` takes for granted, a kind of layer at a time."""
  for key, value in rope.items():
    if key in ("rope_type", "type") and not isinstance(value, str | None):
      raise UserError(f"{name}.{key} must be a name, got {value!r}.")
    if key.endswith("_attention") and value is not None:
      if not isinstance(value, Mapping):
        raise UserError(f"{name}.{key} must be a dictionary, got {value!r}.")
      _check_rope(f"{name}.{key}", value)


def _is_of(value: object, kind: Any) -> bool:
  # JSON's true is no number, though Python's is; 1 is as good as 1.0.
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, int | float if kind is float else kind)


def _check_neutral(
    fields: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]
) -> None:
  ropes = [
      fields.get(name) or {} for name in ("rope_parameters", "rope_scaling")
  ]
  for name, values in neutral.items():
    for holder in (fields, *ropes):
      if name in holder and holder[name] not in values:
        raise UserError(
            f"{name}={holder[name]!r} is not supported in"
            f" model_type={fields['model_type']}; supported:"
            f" {', '.join(_as_json(value) for value in values)}."
        )


def _as_json(value: object) -> str:
  words = {None: "null", False: "false", True: "true"}
  is_word = value is None or isinstance(value, bool)
  return words[value] if is_word else str(value)


def _read_names(
    fields: Mapping[str, Any], family: Family, model_type: str
) -> dict[str, Any]:
  """Reads the fields that are ours by another name, or derived from those."""
  known: dict[str, Any] = dict(family.fixed)
  for ours, theirs in family.names.items():
    if theirs not in fields and theirs not in family.defaults:
      raise UserError(f"{theirs} is missing; model_type={model_type} needs it.")
    value = fields.get(theirs, family.defaults.get(theirs))
    if value is not None:
      known[ours] = _typed(ours, theirs, value)
    elif (
        family.defaults.get(theirs, ...) is not None and ours != "num_kv_heads"
    ):
      raise UserError(f"{theirs} is null; model_type={model_type} needs it.")
  known.setdefault("num_kv_heads", known["num_heads"])
  known.setdefault("hidden_dim", 4 * known["embed_dim"])
  if "head_dim" not in known:
    known["head_dim"] = _head_dim(known["embed_dim"], known["num_heads"])
  return known


def _typed(ours: str, theirs: str, value: Any) -> Any:
  """Checks a value against the type of our field, and gives it that type."""
  if ours == "activation":
    return _activation(theirs, value)
  kind = get_type_hints(TransformerConfig)[ours]
  if _is_of(value, kind):
    if kind is int:
      require.between(theirs, value, 1, 2**31 - 1)
    return float(value) if kind is float else value
  wanted = next(words for words, k in _JSON_TYPES.items() if k == kind)
  raise UserError(f"{theirs} must be {wanted}, got {value!r}.")


def _activation(theirs: str, value: Any) -> str:
  for ours, names in _ACTIVATIONS.items():
    if value in names:
      return ours
  supported = (name for names in _ACTIVATIONS.values() for name in names)
  raise UserError(
      f"{theirs}={value!r} is not supported; supported: {', '.join(supported)}."
  )


def _head_dim(embed_dim: int, num_heads: int) -> int:
  if num_heads < 1 or embed_dim % num_heads:
    raise UserError(
        f"hidden size {embed_dim} is no multiple of {num_heads} attention"
        " heads, and head_dim is not given."
    )
  return embed_dim // num_heads


def _write(config: TransformerConfig, model_type: str) -> dict[str, Any]:
  family = FAMILIES[model_type]
  fields: dict[str, Any] = {
      "architectures": [family.architecture],
      "model_type": model_type,
  }
  for ours, theirs in family.names.items():
    fields[theirs] = getattr(config, ours)
  theirs = family.names["activation"]
  names = {ours: names[0] for ours, names in _ACTIVATIONS.items()}
  names["gelu_tanh"] = family.gelu_tanh
  fields[theirs] = names.get(config.activation)
  return dict(sorted({**fields, **family.write(config)}.items()))


def _unsaid(config: TransformerConfig, model_type: str) -> list[str]:
  """Fields of `config` that are lost when a family writes and reads it."""
  if config.activation not in _ACTIVATIONS:
    return ["activation"]
  try:
    back = from_hf(_write(config, model_type))
  except UserError:
    # Another shape altogether: its own fields contradict each other.
    return [field.name for field in dataclasses.fields(config)]
  return [
      field.name
      for field in dataclasses.fields(config)
      if field.name not in _TRAINING_ONLY
      and _meaning(back, field.name) != _meaning(config, field.name)
  ]


def _meaning(config: TransformerConfig, name: str) -> Any:
  value = getattr(config, name)
  # NTK-aware frequencies are written as the base that they stand for.
  return value.to_hf(config.rotary_dim) if name == "rope" else value
