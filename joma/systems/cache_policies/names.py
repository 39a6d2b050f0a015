"""Policies by the names that flags give them."""

import dataclasses
from typing import Any

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies.by_attention import h2o
from joma.systems.cache_policies.by_attention import keyformer
from joma.systems.cache_policies.by_attention import scissorhands
from joma.systems.cache_policies.by_attention import snapkv
from joma.systems.cache_policies.by_attention import tova
from joma.systems.cache_policies.by_key import expected_attention
from joma.systems.cache_policies.by_key import keydiff
from joma.systems.cache_policies.by_key import knorm
from joma.systems.cache_policies.by_key import lagkv
from joma.systems.cache_policies.by_key import rkv
from joma.systems.cache_policies.by_place import full
from joma.systems.cache_policies.by_place import random
from joma.systems.cache_policies.by_place import window
from joma.systems.cache_policies.own_cache import ada_kv
from joma.systems.cache_policies.own_cache import quest
from scansnap_jax.experiment import errors


def parse(name: str) -> policy_lib.Policy:
  """Returns the policy of `h2o:score=ema:decay=0.98` or `adakv:snapkv`.

  Settings follow a name; `adakv:` goes before that of the policy by which it
  shares slots out, h2o by itself.

  Raises:
    UserError: The name or a setting is unknown, or of another type.
  """
  base, *settings = name.split(":")
  fields: dict[str, Any] = {}
  if base == "adakv":
    shared = parse(":".join(settings) or "h2o")
    return ada_kv.AdaKV(base=shared)
  for setting in settings:
    field, equals, value = setting.partition("=")
    if not equals:
      raise errors.UserError(
          f"policy={name}: settings are written :name=value, got {setting!r}."
      )
    fields[field] = _value(value)
  try:
    return from_name(base, **fields)
  except TypeError as error:
    raise errors.UserError(f"policy={name}: {error}") from error


def _value(text: str) -> Any:
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  named = {"true": True, "false": False, "none": None}
  return named.get(text.lower(), text)


def from_name(name: str, **fields: Any) -> policy_lib.Policy:
  """Returns the policy of a flag's name.

  Args:
    name: A key of `all_policies()`.
    **fields: Of its class.

  Raises:
    UserError: If the name or a field is unknown.
  """
  known = all_policies()
  if name not in known:
    raise errors.UserError(
        f"policy={name!r} is unknown; there are {', '.join(sorted(known))}, and"
        " adakv:NAME."
    )
  policy = known[name]
  names = {field.name for field in dataclasses.fields(policy)}
  unknown = sorted(set(fields) - names)
  if unknown:
    raise errors.UserError(
        f"policy={name!r} has no {unknown[0]!r}; it has"
        f" {', '.join(sorted(names))}."
    )
  return policy(**fields)


def all_policies() -> dict[str, type[policy_lib.Policy]]:
  """Returns the classes that need no other policy, by their flags' names."""
  return {
      "full": full.Full,
      "window": window.Window,
      "random": random.Random,
      "streaming_llm": window.StreamingLLM,
      "h2o": h2o.H2O,
      "scissorhands": scissorhands.Scissorhands,
      "tova": tova.TOVA,
      "snapkv": snapkv.SnapKV,
      "pyramidkv": snapkv.PyramidKV,
      "keyformer": keyformer.Keyformer,
      "knorm": knorm.Knorm,
      "keydiff": keydiff.KeyDiff,
      "rkv": rkv.RKV,
      "lagkv": lagkv.LagKV,
      "expected_attention": expected_attention.ExpectedAttention,
      "quest": quest.Quest,
  }
