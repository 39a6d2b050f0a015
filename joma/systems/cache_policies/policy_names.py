"""Policies by the names that flags give them."""

import dataclasses
from typing import Any

from joma.inference.cache import policy as policy_lib
from joma.systems.cache_policies import head_budgets
from joma.systems.cache_policies import key_policies
from joma.systems.cache_policies import policies
from joma.systems.cache_policies import quest
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
    return head_budgets.AdaKV(base=shared)
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
      "full": policies.Full,
      "window": policies.Window,
      "random": policies.Random,
      "streaming_llm": policies.StreamingLLM,
      "h2o": policies.H2O,
      "scissorhands": policies.Scissorhands,
      "tova": policies.TOVA,
      "snapkv": policies.SnapKV,
      "pyramidkv": policies.PyramidKV,
      "keyformer": policies.Keyformer,
      "knorm": key_policies.Knorm,
      "keydiff": key_policies.KeyDiff,
      "rkv": key_policies.RKV,
      "lagkv": key_policies.LagKV,
      "expected_attention": key_policies.ExpectedAttention,
      "quest": quest.Quest,
  }
