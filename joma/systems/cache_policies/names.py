"""Policies by the names that flags give them: the only list.

Imports no jax: classes are imported when somebody asks for a policy, and are
Any here, for their type would be an import.
"""

import dataclasses
import importlib
import itertools
import types
import typing
from typing import Any

from scansnap_jax.experiment import errors

# Module and class of each policy; a dot before the module is this folder.
POLICIES: dict[str, str] = {
    "full": ".by_place.full:Full",
    "window": ".by_place.window:Window",
    "random": ".by_place.random:Random",
    "streaming_llm": ".by_place.window:StreamingLLM",
    "h2o": ".by_attention.h2o:H2O",
    "scissorhands": ".by_attention.scissorhands:Scissorhands",
    "tova": ".by_attention.tova:TOVA",
    "snapkv": ".by_attention.snapkv:SnapKV",
    "pyramidkv": ".by_attention.snapkv:PyramidKV",
    "chunkkv": ".by_attention.chunkkv:ChunkKV",
    "finch": ".by_attention.finch:Finch",
    "compactor": ".by_attention.compactor:Compactor",
    "kvzip": ".by_attention.kvzip:KVzip",
    "simlayerkv": ".by_attention.simlayerkv:SimLayerKV",
    "keyformer": ".by_attention.keyformer:Keyformer",
    "knorm": ".by_key.knorm:Knorm",
    "keydiff": ".by_key.keydiff:KeyDiff",
    "rkv": ".by_key.rkv:RKV",
    "qfilter": ".by_key.qfilter:QFilter",
    "cur": ".by_key.cur:CUR",
    "lagkv": ".by_key.lagkv:LagKV",
    "expected_attention": ".by_key.expected_attention:ExpectedAttention",
    "quest": ".own_cache.quest:Quest",
    "kivi": ".own_cache.kivi:Kivi",
    "think": ".own_cache.think:ThinK",
}
# Those that go before the name of another policy.
WRAPPERS: dict[str, str] = {
    "adakv": ".own_cache.ada_kv:AdaKV",
    "four_bits": ".own_cache.coded_slots:CodedSlots",
    "criticalkv": ".wrapping.criticalkv:CriticalKV",
    "cam": ".wrapping.cam:CaM",
    "dms": ".wrapping.dms:DMS",
    "by_layer": ".wrapping.layer_budgets:LayerBudgets",
    "two_stage": ".wrapping.composed:Composed",
}
# Those that a flag cannot make, for they need a measurement of one's own; what
# they cost can be said.
MEASURED: dict[str, str] = {
    "duo_attention": ".own_cache.duo_attention:DuoAttention"
}
# Those that need a file of what was fitted to the model beforehand.
FITTED: dict[str, str] = {"kvzap": ".by_attention.kvzap:KVzap"}
# Of those that learn another's scores, whose.
TEACHERS: dict[str, str] = {"kvzap": "kvzip"}
# What kvpress calls a policy, with arguments that make it the same rule.
PRESSES: dict[str, tuple[str, dict[str, int]]] = {
    "knorm:num_recent=0": ("KnormPress", {}),
    "snapkv:window=32": ("SnapKVPress", {"window_size": 32, "kernel_size": 5}),
    "streaming_llm:num_sinks=4": ("StreamingLLMPress", {"n_sink": 4}),
}
# Keeps everything: what others are compared with.
REFERENCE = "full"
# What an evaluation shows beside whatever it is asked for.
BESIDE = (REFERENCE, "window", "random")
# What it is asked for by default.
DEFAULT = ("h2o", "tova", "streaming_llm", "keydiff")
# What a page shows side by side by default.
SHOWN = ("h2o", "snapkv")
# What goes by attention, and the one by place that it must beat.
COMPARED = ("h2o", "streaming_llm")
# What heads keep that need sinks and the last tokens alone.
STREAMING = "streaming_llm"
_PLAIN = {
    bool: "true or false",
    int: "an int",
    float: "a float",
    str: "a name",
    type(None): "none",
}
# What a wrapper wraps where it stands alone.
_WRAPPED = "h2o"


def _all() -> dict[str, str]:
  return {**POLICIES, **WRAPPERS, **MEASURED, **FITTED}


def load(name: str) -> Any:
  """Imports and returns the class of a name of the tables."""
  entry = _all()[name]
  module, _, attribute = entry.partition(":")
  return getattr(importlib.import_module(module, __package__), attribute)


def name_of(policy: Any) -> str:
  """Returns the name that flags give a policy, or else that of its class."""
  cls = type(policy)
  entry = f"{cls.__module__.removeprefix(__package__ or '')}:{cls.__qualname__}"
  known = _all()
  return next((n for n, e in known.items() if e == entry), cls.__name__)


def check(name: str) -> None:
  """Raises UserError unless `costed` knows a name; imports no policy."""
  base = name.partition(":")[0]
  known = sorted(_all())
  if base not in known:
    raise errors.UserError(
        f"policy={name!r} is unknown; there are {', '.join(known)}."
    )


def costed(name: str) -> Any:
  """Returns the policy of a name whose cost is asked, as `parse` does."""
  return load(name)() if name in MEASURED else parse(name)


def label(name: str) -> str:
  """Returns a name as its paper writes it, its settings behind."""
  base, *behind = name.split(":")
  is_known = base in _all()
  known = (load(base).label if is_known else "") or base.replace("_", " ")
  return " ".join([known, *behind])


def settings(name: str) -> frozenset[str]:
  """Returns the fields that a name such as `snapkv:window=8` sets."""
  return frozenset(part.partition("=")[0] for part in name.split(":")[1:])


def parse(name: str) -> Any:
  """Returns the policy of `h2o:score=ema:decay=0.98` or `adakv:snapkv`.

  Settings follow a name; a wrapper such as `adakv:` goes before that of the
  policy that it wraps, h2o by itself, its own settings between the two. One of
  two policies has both, as `two_stage:snapkv+knorm`.

  Raises:
    UserError: The name or a setting is unknown, or of another type.
  """
  base, *parts = name.split(":")
  if base not in WRAPPERS:
    return _called(name, base, parts)
  own = list(itertools.takewhile(lambda part: "=" in part, parts))
  rest = ":".join(parts[len(own) :]) or _WRAPPED
  kind = load(base)
  is_of_two = "first" in kind.__dataclass_fields__
  first, plus, second = rest.partition("+")
  if plus and not is_of_two:
    raise errors.UserError(f"policy={name}: {base} wraps one policy.")
  bases = {"base": parse(first)}
  if is_of_two:
    bases = {"first": parse(first), "base": parse(second or _WRAPPED)}
  return kind(**bases, **_fields(base, kind, _settings(name, own)))


def _called(name: str, base: str, parts: list[str]) -> Any:
  try:
    return from_name(base, **_settings(name, parts))
  except TypeError as error:
    raise errors.UserError(f"policy={name}: {error}") from error


def _settings(name: str, parts: list[str]) -> dict[str, Any]:
  fields: dict[str, Any] = {}
  for setting in parts:
    field, equals, value = setting.partition("=")
    if not equals:
      raise errors.UserError(
          f"policy={name}: settings are written :name=value, got {setting!r}."
      )
    fields[field] = _value(value)
  return fields


def _value(text: str) -> Any:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  named = {"true": True, "false": False, "none": None}
  return named.get(text.lower(), text)


def from_name(name: str, **fields: Any) -> Any:
  """Returns the policy of a flag's name.

  Args:
    name: A key of `all_policies()` or `FITTED`.
    **fields: Of its class.

  Raises:
    UserError: If the name or a field is unknown, or a value of another type
      than its field.
  """
  known = all_policies() | {name: load(name) for name in FITTED}
  if name not in known:
    raise errors.UserError(
        f"policy={name!r} is unknown; there are {', '.join(sorted(known))}, and"
        f" {', '.join(f'{wrapper}:NAME' for wrapper in WRAPPERS)}."
    )
  return known[name](**_fields(name, known[name], fields))


def _fields(name: str, kind: Any, fields: dict[str, Any]) -> dict[str, Any]:
  """Settings of a class, checked."""
  names = {field.name for field in dataclasses.fields(kind)}
  unknown = sorted(set(fields) - names)
  if unknown:
    raise errors.UserError(
        f"policy={name!r} has no {unknown[0]!r}; it has"
        f" {', '.join(sorted(names))}."
    )
  hints = typing.get_type_hints(kind)
  return {
      field: _typed(f"policy={name!r}", field, value, hints[field])
      for field, value in fields.items()
  }


def _typed(policy: str, field: str, value: object, hint: Any) -> object:
  """Returns a setting as its field has it: beta=1 is meant as beta=1.0.

  Raises:
    UserError: If it is of another type.
  """
  kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
  if float in kinds and type(value) is int:
    return float(value)
  if {*kinds} <= {*_PLAIN} and type(value) not in kinds:
    wanted = " or ".join(_PLAIN[kind] for kind in kinds)
    raise errors.UserError(f"{policy}: {field}={value} must be {wanted}.")
  return value


def _is_union(hint: Any) -> bool:
  return isinstance(hint, types.UnionType)


def all_policies() -> dict[str, Any]:
  """Returns the classes that need no other policy, by their flags' names."""
  return {name: load(name) for name in POLICIES}
