"""Flag sets drawn of what a script's own flags say that they expect."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_INTS = (
    *("0", "1", "2", "3", "7", "16", "-1", "-7", "1000", "1000000"),
    *("2147483647", "2147483648", "4294967296", "9223372036854775807"),
    *("18446744073709551616", "-9223372036854775809", "1" + "0" * 30),
    *("", "x", "1.5", "1e3", "0x10", "1_0", " 3", "٣", "9" * 5000),
)
_FLOATS = (
    *("0", "1", "0.5", "0.1", "2", "-1", "1e-30", "1e-300", "5e-324", "1e30"),
    *("1e308", "-1e308", "inf", "-inf", "nan", "", "x", "1,5", "9" * 400),
)
_WORDS = (
    *("", " ", "x", "none", "text.txt", "model", "empty", "nowhere", "."),
    *("..", "/", "~", "~nouser/x", "text.txt/x", "model/config.json", "pipe"),
    *("loop", "a,b", ",", "[/]", "[red]", ":smile:", "$x$", "$", "{0}", "%s"),
    *("\udcff", "é", "a\nb", "\t", "x" * 300, "x" * 10_000, "gs://b/x", "-1"),
    *("http://x/y", "h2o:score=ema", "h2o:", ":", "=", "model*", "[", "**"),
    *("/proc/self/status", "/nowhere/x", "bytes", "tinyshakespeare"),
)
_BOOLS = ("true", "false", "1", "0", "", "x", "none", "2")
_LONG = 50


class Drawer:
  """Draws flag sets of the scripts, by a seed."""

  def __init__(self, seed: int):
    """Takes the seed."""
    self._random = np.random.default_rng(seed)

  def draw(self, found: Sequence[Mapping[str, Any]]) -> list[str]:
    """One to three flags of a script, with values."""
    count = min(len(found), int(self._random.integers(1, 4)))
    chosen = self._random.choice(len(found), count, replace=False)
    return [self._flag(found[int(i)]) for i in chosen]

  def _flag(self, flag: Mapping[str, Any]) -> str:
    if flag["is_bool"] and self._random.random() < 0.5:
      return "--" + self._any(("", "no")) + flag["name"]
    value = self._value(flag["expects"], flag["choices"])
    return f"--{flag['name']}={value}"

  def _value(self, expects: str, choices: Sequence[str]) -> str:
    """A text for what is expected, which now and then is none of it."""
    if self._random.random() < 0.05:
      return self._any(_WORDS)
    if choices:
      return self._any(choices)
    if expects.endswith(", or none") and self._random.random() < 0.2:
      return "none"
    expects = expects.removesuffix(", or none")
    each = expects.partition("comma-separated, each ")[2]
    if each or "comma" in expects:
      count = int(self._random.integers(4))
      return ",".join(self._value(each or "a string", ()) for _ in range(count))
    if expects.startswith("one of: "):
      return self._any(expects.removeprefix("one of: ").split(", "))
    return self._any(_values_of(expects))

  def _any(self, among: Sequence[str]) -> str:
    return among[int(self._random.integers(len(among)))]


def _values_of(expects: str) -> Sequence[str]:
  kinds = {"int": _INTS, "float": _FLOATS, "number": _FLOATS, "bool": _BOOLS}
  if "true or false" in expects:
    return _BOOLS
  for kind, values in kinds.items():
    if kind in expects:
      return values
  return _WORDS


def shorten(argv: Sequence[str]) -> str:
  """The flags as a failure shows them."""
  return " ".join(
      repr(a if len(a) < _LONG else a[:_LONG] + "...") for a in argv
  )
