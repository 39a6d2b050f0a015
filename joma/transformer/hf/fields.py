"""What is no renaming between config.json and a TransformerConfig.

One pair of functions a family, inverse to each other: `read_*` takes the fields
of config.json and what is known so far of the TransformerConfig, and returns
further fields of the latter; `write_*` returns what it reads. `hf_families`
says the rest. Imports no jax.
"""

from collections.abc import Mapping
from typing import Any

from joma.transformer.config import TransformerConfig
from joma.transformer.rope import config as rope_config
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

Fields = Mapping[str, Any]

BIASES = ("use_qkv_bias", "use_attn_out_bias", "use_mlp_bias")
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_gpt2(fields: Fields, known: Fields) -> Fields:
  """Logits are divided by sqrt(H), or by nothing."""
  is_scaled = fields.get("scale_attn_weights", True)
  return {"attn_scale": None if is_scaled else 1.0}


def write_gpt2(config: TransformerConfig) -> Fields:
  """Undoes `read_gpt2`."""
  return {
      "embd_pdrop": config.dropout,
      "scale_attn_weights": config.attn_scale is None,
  }


def read_opt(fields: Fields, known: Fields) -> Fields:
  """Norms before or after, biases all or none, narrower embeddings."""
  width = fields.get("word_embed_proj_dim")
  has_bias = fields.get("enable_bias", True)
  is_pre = fields.get("do_layer_norm_before", True)
  is_final_removed = fields.get("_remove_final_layer_norm", False)
  return {
      "embed_proj_dim": None if width == known["embed_dim"] else width,
      "norm_placement": "pre" if is_pre else "post",
      "use_final_norm": is_pre and not is_final_removed,
      **dict.fromkeys(BIASES, has_bias),
  }


def write_opt(config: TransformerConfig) -> Fields:
  """Undoes `read_opt`."""
  is_pre = config.norm_placement == "pre"
  return {
      "do_layer_norm_before": is_pre,
      "_remove_final_layer_norm": is_pre and not config.use_final_norm,
      "enable_bias": config.use_qkv_bias,
      "layer_norm_elementwise_affine": True,
      "word_embed_proj_dim": config.embed_proj_dim or config.embed_dim,
  }


def read_gpt_neox(fields: Fields, known: Fields) -> Fields:
  """Rotary positions of a part of each head."""
  rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
  fraction = rope.get("partial_rotary_factor")
  if fraction is None:
    fraction = fields.get("rotary_pct", 0.25)
  is_number = isinstance(fraction, int | float)
  if not is_number or isinstance(fraction, bool) or not 0 < fraction <= 1:
    raise UserError(
        "partial_rotary_factor (or rotary_pct) must be a number in (0, 1], got"
        f" {fraction!r}."
    )
  return {
      "rope": rope_config.from_hf(fields),
      "rotary_fraction": float(fraction),
      **_read_attention_bias(fields, True),
  }


def write_gpt_neox(config: TransformerConfig) -> Fields:
  """Undoes `read_gpt_neox`."""
  rope = _write_rope(config)
  part = {"partial_rotary_factor": config.rotary_fraction}
  return {
      "rope_parameters": {**rope["rope_parameters"], **part},
      "rope_scaling": rope["rope_scaling"] and {**rope["rope_scaling"], **part},
      "rotary_emb_base": rope["rope_theta"],
      "rotary_pct": config.rotary_fraction,
      "attention_bias": config.use_qkv_bias,
  }


def _read_attention_bias(fields: Fields, default: bool = False) -> Fields:
  has_bias = fields.get("attention_bias", default)
  return {"use_qkv_bias": has_bias, "use_attn_out_bias": has_bias}


def read_llama(fields: Fields, known: Fields) -> Fields:
  """Rotary positions, and biases of attention and MLP."""
  return {
      "rope": rope_config.from_hf(fields),
      "use_mlp_bias": fields.get("mlp_bias", False),
      **_read_attention_bias(fields),
  }


def write_llama(config: TransformerConfig) -> Fields:
  """Undoes `read_llama`."""
  return {
      "attention_bias": config.use_qkv_bias,
      "mlp_bias": config.use_mlp_bias,
      **_write_rope(config),
  }


def _write_rope(config: TransformerConfig) -> Fields:
  """Both generations: `rope_parameters`, and the two keys before it."""
  rope = config.rope.to_hf(config.rotary_dim)
  is_plain = rope["rope_type"] == "default"
  return {
      "rope_parameters": rope,
      "rope_scaling": None if is_plain else dict(rope),
      "rope_theta": rope["rope_theta"],
  }


def read_mistral(fields: Fields, known: Fields) -> Fields:
  """One window for all layers, or none."""
  window = fields.get("sliding_window", 4096)
  num_layers = known["num_layers"]
  types = _layer_types(fields, num_layers) or []
  if len(set(types)) > 1 or (types and (types[0] == _SLIDING) != bool(window)):
    raise UserError(
        f"model_type=mistral has one window for all layers: layer_types={types}"
        f" contradicts sliding_window={window}."
    )
  return {
      "rope": rope_config.from_hf(fields),
      "windows": (window,) * num_layers if window else (),
  }


def write_mistral(config: TransformerConfig) -> Fields:
  """Undoes `read_mistral`."""
  window = config.windows[0] if config.windows else None
  return {"sliding_window": window, **_write_rope(config)}


def read_qwen(fields: Fields, known: Fields) -> Fields:
  """Windows in the layers that layer_types says, or from one layer on."""
  num_layers = known["num_layers"]
  use_window = fields.get("use_sliding_window", False)
  window = fields.get("sliding_window", 4096) if use_window else None
  first = fields.get("max_window_layers", 28)
  types = _layer_types(fields, num_layers)
  if types is None:
    types = [
        _SLIDING if window and layer >= first else _FULL
        for layer in range(num_layers)
    ]
  return {
      "rope": rope_config.from_hf(fields),
      "windows": _windows(types, window),
  }


def read_qwen3(fields: Fields, known: Fields) -> Fields:
  """As `read_qwen`, with a switch for biases."""
  return {**read_qwen(fields, known), **_read_attention_bias(fields)}


def write_qwen(config: TransformerConfig) -> Fields:
  """Undoes `read_qwen`."""
  sliding = [i for i, window in enumerate(config.windows) if window]
  first = sliding[0] if sliding else config.num_layers
  return {
      "use_sliding_window": bool(sliding),
      "sliding_window": config.windows[first] if sliding else None,
      "max_window_layers": first,
      "layer_types": _write_layer_types(config),
      **_write_rope(config),
  }


def write_qwen3(config: TransformerConfig) -> Fields:
  """Undoes `read_qwen3`."""
  return {"attention_bias": config.use_qkv_bias, **write_qwen(config)}


def read_gemma(fields: Fields, known: Fields) -> Fields:
  """Embeddings times sqrt(D), and the old name of the activation."""
  if fields.get("hidden_activation") not in (None, "gelu_pytorch_tanh"):
    raise UserError(
        f"hidden_activation={fields['hidden_activation']!r} is not supported in"
        " model_type=gemma; supported: gelu_pytorch_tanh, null."
    )
  # Its first folders say hidden_act=gelu and mean the tanh approximation.
  is_gelu = known["activation"] == "gelu"
  return {
      **_read_gemma_body(fields, known),
      "activation": "gelu_tanh" if is_gelu else known["activation"],
  }


def _read_gemma_body(fields: Fields, known: Fields) -> Fields:
  return {
      "rope": rope_config.from_hf(fields),
      "embed_scale": known["embed_dim"] ** 0.5,
      **_read_attention_bias(fields),
  }


def write_gemma(config: TransformerConfig) -> Fields:
  """Undoes `read_gemma`."""
  return {"attention_bias": config.use_qkv_bias, **_write_rope(config)}


def read_gemma2(fields: Fields, known: Fields) -> Fields:
  """Soft caps, a scale of its own, every second layer with a window."""
  return {
      **_read_gemma_body(fields, known),
      **_read_query_scale(fields, known),
      "windows": _read_alternating(fields, known, period=2),
      "attn_logits_soft_cap": fields.get("attn_logit_softcapping", 50.0),
      "output_logits_soft_cap": fields.get("final_logit_softcapping", 30.0),
  }


def write_gemma2(config: TransformerConfig) -> Fields:
  """Undoes `read_gemma2`."""
  return {
      **write_gemma(config),
      **_write_alternating(config),
      "attn_logit_softcapping": config.attn_logits_soft_cap,
      "final_logit_softcapping": config.output_logits_soft_cap,
  }


def read_gemma3(fields: Fields, known: Fields) -> Fields:
  """Plain rotary positions of another base where there is a window."""
  rope = rope_config.from_hf(
      fields, layer_type=_FULL, default_theta=1_000_000.0
  )
  period = fields.get("sliding_window_pattern", 6)
  require.at_least("sliding_window_pattern", period, 1)
  return {
      **_read_query_scale(fields, known),
      **_read_attention_bias(fields),
      "rope": rope,
      "local_rope_theta": _read_local_theta(fields),
      "embed_scale": known["embed_dim"] ** 0.5,
      "windows": _read_alternating(fields, known, period),
      "output_logits_soft_cap": fields.get("final_logit_softcapping"),
  }


def _read_local_theta(fields: Fields) -> float:
  theta = float(fields.get("rope_local_base_freq", 10_000.0))
  nested = (fields.get("rope_parameters") or {}).get(_SLIDING)
  local = rope_config.from_hf(
      {"rope_type": "default", **(nested or {})}, default_theta=theta
  )
  if local.rope_type != "default":
    raise UserError(
        f"rope_parameters.{_SLIDING}.rope_type={local.rope_type!r} is not"
        " supported in model_type=gemma3_text; supported: default."
    )
  return local.rope_theta


def write_gemma3(config: TransformerConfig) -> Fields:
  """Undoes `read_gemma3`."""
  rope = _write_rope(config)
  local = {"rope_theta": config.local_rope_theta, "rope_type": "default"}
  return {
      **rope,
      **_write_alternating(config),
      "attention_bias": config.use_qkv_bias,
      "rope_parameters": {_FULL: rope["rope_parameters"], _SLIDING: local},
      "rope_local_base_freq": config.local_rope_theta,
      "final_logit_softcapping": config.output_logits_soft_cap,
      "attn_logit_softcapping": None,
  }


def _read_query_scale(fields: Fields, known: Fields) -> Fields:
  scalar = fields.get("query_pre_attn_scalar", 256)
  return {"attn_scale": None if scalar == known["head_dim"] else scalar**-0.5}


def _read_alternating(
    fields: Fields, known: Fields, period: int
) -> tuple[int, ...]:
  """Windows in all layers but each `period`-th, or as layer_types says."""
  num_layers = known["num_layers"]
  types = _layer_types(fields, num_layers)
  if types is None:
    types = [
        _SLIDING if (layer + 1) % period else _FULL
        for layer in range(num_layers)
    ]
  return _windows(types, fields.get("sliding_window", 4096))


def _write_alternating(config: TransformerConfig) -> Fields:
  scale = config.attn_scale
  scalar = config.head_dim if scale is None else scale**-2
  return {
      "query_pre_attn_scalar": round(scalar),
      # transformers wants a number even where no layer uses it.
      "sliding_window": max(config.windows, default=0) or config.max_len,
      "layer_types": _write_layer_types(config),
  }


def _layer_types(fields: Fields, num_layers: int) -> list[str] | None:
  """Returns layer_types, checked; None where config.json has none."""
  types = fields.get("layer_types")
  if types is None:
    return None
  unknown = sorted({str(kind) for kind in types} - {_SLIDING, _FULL})
  if unknown:
    raise UserError(
        f"layer_types={', '.join(unknown)} is not supported; supported:"
        f" {_FULL}, {_SLIDING}."
    )
  if len(types) != num_layers:
    raise UserError(
        f"layer_types names {len(types)} layers, num_hidden_layers is"
        f" {num_layers}."
    )
  return list(types)


def _windows(types: list[str], window: int | None) -> tuple[int, ...]:
  if _SLIDING not in types:
    return ()
  if not window:
    raise UserError(
        f"layer_types has {_SLIDING}, and sliding_window={window} (or"
        " use_sliding_window=false) gives it no window."
    )
  return tuple(window if kind == _SLIDING else 0 for kind in types)


def _write_layer_types(config: TransformerConfig) -> list[str]:
  windows = config.windows or (0,) * config.num_layers
  return [_SLIDING if window else _FULL for window in windows]
