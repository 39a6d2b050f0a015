"""A frozen dataclass becomes absl flags, and a flagfile.

A hyperparameter is written once, as a field of a frozen dataclass with a line
in the `Attributes:` of its docstring. `define(Config())` turns every field into
a flag with the field's type, default and help; nested dataclasses give dotted
flags (`--optimizer.learning_rate`). A field may be

  bool, int, float, str, an Enum (by its name), a Literal;
  tuple[X, ...] of these, written `1,2,3` and empty for no item;
  X | None, where the text `none` is None.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import enum
import inspect
import math
import re
import sys
import textwrap
import typing
from typing import Any, Literal, TypeVar

from absl import flags

from scansnap_jax.experiment import errors

flags.disclaim_key_flags()  # --help lists the flags under the script.

T = TypeVar("T")


def define(
    default: T,
    *,
    prefix: str = "",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> Callable[..., T]:
  """Defines a flag for every leaf field of `default`.

  Args:
    default: A frozen dataclass; its values are the defaults that --help shows.
    prefix: Put before each flag's name.
    flag_values: Where the flags live.

  Returns:
    `build(base=None)`: the parsed config. It starts from `base` (a preset; None
    is `default`) and replaces the fields whose flag was given, on the command
    line or in a flagfile. It raises `UserError`, naming the flags, when the
    dataclass refuses the values.

  Raises:
    TypeError: A field has a type that no flag can hold.
    ValueError: A field has no line in the docstring's `Attributes:`.
  """
  for name, hint, value, text in _leaves(default, prefix):
    codec = _codec(hint, name)
    flag = flags.Flag(
        _Parser(codec=codec),
        None,
        name,
        value,
        text,
        boolean=codec.parse is _parse_bool,
    )
    flag.default_as_str = codec.format(value) or "''"
    flags.DEFINE_flag(flag, flag_values)

  def build(base: T | None = None) -> T:
    if not flag_values.is_parsed():
      raise flags.UnparsedFlagAccessError("the flags are not parsed yet")
    if base is not None and type(base) is not type(default):
      raise TypeError(f"expected a {type(default).__name__}, got {base!r}")
    return _build(default if base is None else base, prefix, flag_values)

  return build


def to_flagfile(
    config: Any, extra: Mapping[str, object], *, prefix: str = ""
) -> str:
  """Writes every value of `config` as a flagfile, one `--name=value` a line.

  A script that reads the text back through `--flagfile` builds an equal
  config, whatever its preset.

  Args:
    config: The resolved config.
    extra: Further flags of the run, written first. None leaves one out.
    prefix: The prefix given to `define`.

  Raises:
    UserError: A value has no text that parses back to it, such as a string
      with a newline.
  """
  lines = lines_of(extra)
  for name, hint, value, _ in _leaves(config, prefix):
    if name in extra:
      raise ValueError(f"{name} is both a field and an extra flag")
    lines.append(_value_line(name, hint, value))
  return "".join(lines)


def given_to_flagfile(
    default: Any,
    extra: Mapping[str, object],
    *,
    prefix: str = "",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> str:
  """Writes the flags that were given, for runs of several configs.

  Arguments and errors are those of `define` and `to_flagfile`.
  """
  lines = lines_of(extra)
  for name, hint, _, _ in _leaves(default, prefix):
    if not flag_values[name].using_default_value:
      lines.append(_value_line(name, hint, flag_values[name].value))
  return "".join(lines)


def lines_of(extra: Mapping[str, object]) -> list[str]:
  """Lines of a flagfile, of flags and their values; None leaves one out.

  Raises:
    UserError: A value cannot be written to one line.
  """
  return [
      _line(name, _text(value))
      for name, value in extra.items()
      if value is not None
  ]


def _value_line(name: str, hint: Any, value: Any) -> str:
  codec = _codec(hint, name)
  text = codec.format(value)
  try:
    parsed = codec.parse(text)
  except ValueError:
    parsed = None
  if parsed != value:
    raise errors.UserError(f"--{name} cannot be written as text: {value!r}")
  return _line(name, text)


def _line(name: str, text: str) -> str:
  """Returns one line of a flagfile; absl strips lines when it reads them."""
  line = f"--{name}={text}"
  if not line.isprintable() or line.strip() != line:
    raise errors.UserError(
        f"--{name} cannot be written to a flagfile, where a value is one line"
        f" of printable text with no space at its end: {text!r}"
    )
  return line + "\n"


def _build(base: Any, prefix: str, flag_values: flags.FlagValues) -> Any:
  changes, given = {}, []
  for field, hint in _fields(type(base)):
    name = prefix + field.name
    if dataclasses.is_dataclass(hint):
      changes[field.name] = _build(
          getattr(base, field.name), name + ".", flag_values
      )
    elif not flag_values[name].using_default_value:
      changes[field.name] = flag_values[name].value
      given.append((field.name, name))
  try:
    return dataclasses.replace(base, **changes)
  except ValueError as error:
    # The flags that the message speaks of; if it names none, all that count.
    named = [g for g in given if re.search(rf"\b{g[0]}\b", str(error))]
    at_fault = [f"--{name}" for _, name in named or given]
    where = f" (from {', '.join(at_fault)})" if at_fault else ""
    raise errors.UserError(f"{error}{where}") from error


def _leaves(config: Any, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
  """Yields flag name, type, value and help of every leaf, in field order."""
  help_of = _attribute_docs(type(config))
  for field, hint in _fields(type(config)):
    name, value = prefix + field.name, getattr(config, field.name)
    if field.name not in help_of:
      raise ValueError(
          f"{type(config).__name__}.{field.name} has no line in Attributes:"
      )
    if dataclasses.is_dataclass(hint):
      yield from _leaves(value, name + ".")
    else:
      yield name, hint, value, help_of[field.name]


def _fields(cls: Any) -> list[tuple[dataclasses.Field, Any]]:
  if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
    raise TypeError(f"{cls.__name__} is not a frozen dataclass")
  hints = typing.get_type_hints(cls)
  return [(f, hints[f.name]) for f in dataclasses.fields(cls) if f.init]


def _attribute_docs(cls: type) -> dict[str, str]:
  """Reads the `Attributes:` sections of a class and of those it extends."""
  docs = {}
  for base in reversed(cls.__mro__):
    section = re.search(
        r"^Attributes:\n((?:[ ].*\n|\n)*)",
        inspect.cleandoc(_docstring(base)) + "\n",
        re.MULTILINE,
    )
    body = inspect.cleandoc("\n" + section[1]) if section else ""
    for entry in re.split(r"\n+(?=\w)", body):
      name, _, text = entry.partition(":")
      docs[name] = " ".join(text.split())
  return {name: text for name, text in docs.items() if text}


def _docstring(cls: type) -> str:
  """Returns a class's docstring, which `python -OO` leaves in its source."""
  # A dataclass without one gets its signature for a docstring.
  if sys.flags.optimize > 1 and dataclasses.is_dataclass(cls):
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    return ast.get_docstring(tree) or ""
  return cls.__doc__ or ""


class _Parser(flags.ArgumentParser):
  """A codec as absl wants it; absl adds the flag and the value to errors."""

  def __init__(self, *, codec: "_Codec"):
    super().__init__()
    self._codec = codec
    self.syntactic_help = codec.expects

  def parse(self, argument: object) -> Any:
    if isinstance(argument, str) and not isinstance(argument, enum.Enum):
      return self._codec.parse(argument)
    return argument  # A default, which is a value already.

  def flag_type(self) -> str:
    return self._codec.expects


@dataclasses.dataclass(frozen=True)
class _Codec:
  """How values of one type are read and written.

  Attributes:
    parse: Text to value; raises ValueError.
    format: Value to text.
    expects: What the text should be, for --help and errors.
  """

  parse: Callable[[str], Any]
  format: Callable[[Any], str]
  expects: str


def _codec(hint: Any, name: str) -> _Codec:
  """Returns the codec of a field's type."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if type(None) in args and len(args) == 2:
    (inner,) = set(args) - {type(None)}
    return _optional(_codec(inner, name))
  if origin is Literal and None in args:
    choices = tuple(a for a in args if a is not None)
    return _optional(_choice({_text(a): a for a in choices}))
  if origin is Literal:
    return _choice({_text(a): a for a in args})
  if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
    return _tuple(_codec(args[0], name))
  if isinstance(hint, type) and issubclass(hint, enum.Enum):
    return _choice({_text(member): member for member in hint})
  if hint in _SCALARS:
    return _SCALARS[hint]
  raise TypeError(f"{name}: no flag can hold a {hint}")


def _text(value: object) -> str:
  if isinstance(value, enum.Enum):
    return value.name.lower()
  if isinstance(value, bool):
    return "true" if value else "false"
  return repr(value) if isinstance(value, float) else str(value)


_LARGEST_INT = 2**31 - 1


def _parse_bool(text: str) -> bool:
  values = {"true": True, "t": True, "1": True}
  values |= {"false": False, "f": False, "0": False}
  if text.lower() not in values:
    raise ValueError("expected true or false")
  return values[text.lower()]


def _parse_int(text: str) -> int:
  try:
    value = int(text)
  except ValueError:
    raise ValueError("expected an int, such as 3") from None
  if not -_LARGEST_INT <= value <= _LARGEST_INT:
    raise ValueError(
        f"expected an int from {-_LARGEST_INT} to {_LARGEST_INT}, which the"
        " int32 of devices can hold"
    )
  return value


def _parse_float(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    raise ValueError("expected a float, such as 0.5") from None
  if math.isnan(value):
    raise ValueError("expected a float, and NaN is none to work with")
  return value


_SCALARS: dict[Any, _Codec] = {
    bool: _Codec(_parse_bool, _text, "true or false"),
    int: _Codec(_parse_int, _text, "an int"),
    float: _Codec(_parse_float, _text, "a float"),
    str: _Codec(str, _text, "a string"),
}


def _choice(values: dict[str, Any]) -> _Codec:
  listed = ", ".join(values)

  def parse(text: str) -> Any:
    if text not in values:
      raise ValueError(f"expected one of: {listed}")
    return values[text]

  return _Codec(parse, _text, f"one of: {listed}")


def _optional(inner: _Codec) -> _Codec:
  def parse(text: str) -> Any:
    return None if text.lower() == "none" else inner.parse(text)

  return _Codec(
      parse,
      lambda value: "none" if value is None else inner.format(value),
      f"{inner.expects}, or none",
  )


def _tuple(inner: _Codec) -> _Codec:
  def parse(text: str) -> tuple[Any, ...]:
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if "" in items:
      raise ValueError("expected no empty item between commas")
    return tuple(inner.parse(item) for item in items)

  return _Codec(
      parse,
      lambda values: ",".join(inner.format(value) for value in values),
      f"comma-separated, each {inner.expects}",
  )
