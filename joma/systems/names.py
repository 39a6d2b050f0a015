"""The attention systems by the names that configs give them: the only list.

An entry such as `sink_logits` or `hip:k=512+gated` is parts joined by `+`, each
a name and its options; `softmax`, or nothing, is plain attention. A config has
one entry for all layers, one a layer, or a pattern that repeats. Imports no
jax: classes are imported when a model asks for its layers.
"""

import dataclasses
import difflib
import importlib
from typing import Any

from scansnap_jax.experiment import errors

PLAIN = "softmax"

# Module and class of each system.
SYSTEMS: dict[str, str] = {
    "act": "joma.systems.score_rules.calibrated.act:Act",
    "convolved": "joma.systems.score_rules.convolved:Convolved",
    "differential": "joma.systems.score_rules.differential:Differential",
    "distance_bias": "joma.systems.score_rules.distance_bias:DistanceBias",
    "duo_gates": "joma.systems.score_rules.duo_gates:DuoGates",
    "echo_att": "joma.systems.reuse.echo_att:EchoAtt",
    "flux": "joma.systems.routers.flux:Flux",
    "gated_attention": "joma.systems.routers.gated_attention:GatedAttention",
    "gated_conv": "joma.systems.mixers.convolutions.gated_conv:GatedConv",
    "gdn": "joma.systems.mixers.gdn:Gdn",
    "grid_bias": "joma.systems.score_rules.grid_bias:GridBias",
    "grid_conv": "joma.systems.mixers.convolutions.grid_conv:GridConv",
    "hip": "joma.systems.selectors.hip:Hip",
    "hylra": "joma.systems.reuse.hylra:Hylra",
    "indexer": "joma.systems.selectors.indexer:Indexer",
    "kda": "joma.systems.mixers.kda:Kda",
    "key_bias": "joma.systems.score_rules.key_bias:KeyBias",
    "landmark": "joma.systems.selectors.landmark:Landmark",
    "lightning": "joma.systems.mixers.lightning:Lightning",
    "moh": "joma.systems.routers.moh:Moh",
    "moh_blocks": "joma.systems.routers.moh_blocks:MohBlocks",
    "moh_norms": "joma.systems.routers.moh_norms:MohNorms",
    "nats": "joma.systems.routers.nats:Nats",
    "no_mixing": "joma.systems.mixers.no_mixing:NoMixing",
    "nsa": "joma.systems.selectors.branches.nsa:Nsa",
    "pointwise": "joma.systems.score_rules.pointwise:Pointwise",
    "positional": "joma.systems.score_rules.positional:Positional",
    "self_gating": "joma.systems.mixers.self_gating:SelfGating",
    "moba": "joma.systems.selectors.moba:Moba",
    "sink_logits": "joma.systems.score_rules.sink_logits:SinkLogits",
    "ssa": "joma.systems.score_rules.ssa:Ssa",
    "static_qk": "joma.systems.score_rules.static_qk:StaticQk",
    "superlinear": "joma.systems.mixers.superlinear:Superlinear",
    "titans": "joma.systems.mixers.memory.titans:Titans",
    "xattention": "joma.systems.selectors.xattention:XAttention",
}


@dataclasses.dataclass(frozen=True)
class Part:
  """One system of an entry, not imported yet.

  Attributes:
    name: A key of SYSTEMS.
    options: Names and values, as they are written.
    entry: Where it stands, for messages.
  """

  name: str
  options: tuple[tuple[str, str], ...]
  entry: str


def check(attention: tuple[str, ...], num_layers: int) -> None:
  """Raises UserError if an entry cannot be read, or their number does not fit.

  Args:
    attention: Entries, as in `TransformerConfig`.
    num_layers: L, a multiple of their number.
  """
  if len(attention) > num_layers:
    raise errors.UserError(
        f"attention has {len(attention)} entries, but the model has"
        f" {num_layers} layers: give one, one a layer, or a shorter pattern."
    )
  # A pattern cut short would put other systems into the last layers than its
  # writer counted on.
  if attention and num_layers % len(attention):
    raise errors.UserError(
        f"attention has {len(attention)} entries, a pattern that does not fit"
        f" {num_layers} layers: give one entry, one a layer, or a number of"
        f" them that divides {num_layers}."
    )
  for entry in attention:
    parts(entry)


def entry_of(attention: tuple[str, ...], layer: int) -> str:
  """Returns the entry of a layer: the pattern repeats."""
  return attention[layer % len(attention)] if attention else PLAIN


def parts(entry: str) -> tuple[Part, ...]:
  """Takes an entry apart.

  Args:
    entry: As `ssa+hip:k=512`.

  Raises:
    UserError: If a name is unknown or stands twice, or an option is no pair.
  """
  found: list[Part] = []
  for text in entry.split("+"):
    name, *settings = text.strip().split(":")
    if name == PLAIN and entry.strip() == PLAIN:
      return ()
    if name == PLAIN:
      raise errors.UserError(
          f"attention={entry!r}: {PLAIN!r} stands alone and has no options;"
          " what else the entry names changes it, so leave it out."
      )
    if name not in SYSTEMS:
      raise errors.UserError(_unknown(name, entry))
    if name in (part.name for part in found):
      raise errors.UserError(f"attention={entry!r} has {name!r} twice.")
    pairs = [setting.partition("=") for setting in settings]
    for option, equals, value in pairs:
      if not (option and equals and value):
        raise errors.UserError(
            f"attention={entry!r}: options are written :name=value, got"
            f" {option + equals + value!r}."
        )
    options = tuple((option, value) for option, _, value in pairs)
    found.append(Part(name, options, entry))
  return tuple(found)


def load(name: str) -> Any:
  """Imports and returns a system's class."""
  module, _, attribute = SYSTEMS[name].partition(":")
  return getattr(importlib.import_module(module), attribute)


def make(part: Part) -> Any:
  """Returns a system with its options.

  Raises:
    UserError: If an option is unknown or its value of another type.
  """
  system = load(part.name)
  fields = {field.name: field for field in dataclasses.fields(system)}
  options: dict[str, Any] = {}
  for option, text in part.options:
    if option not in fields:
      known = ", ".join(sorted(fields)) or "none"
      raise errors.UserError(
          f"attention={part.entry!r}: {part.name} has no option {option!r};"
          f" its options: {known}."
      )
    options[option] = _typed(part, option, text, fields[option].default)
  return system(**options)


def _unknown(name: str, entry: str) -> str:
  known = sorted((*SYSTEMS, PLAIN))
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
  return (
      f"attention={entry!r}: there is no system {name!r}; the nearest is"
      f" {near[0]!r}, of {', '.join(known)}."
  )


def _typed(part: Part, option: str, text: str, default: Any) -> Any:
  """Reads a value as the type of the option's default."""
  kind = type(default)
  words = {"true": True, "false": False}
  try:
    return words[text.lower()] if kind is bool else kind(text)
  except (KeyError, ValueError):
    raise errors.UserError(
        f"attention={part.entry!r}: {option} must be like {default!r}, got"
        f" {text!r}."
    ) from None
