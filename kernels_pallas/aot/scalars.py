"""Reads the scalar instructions of libtpu's final schedules.

What a kernel does next is decided by its scalar unit alone: registers, scalar
memory (SMEM), and copies of tables into it. An instruction is one of

  %s53_s27 = sadd.s32 1, %s9625_s23
  %s18_s28 = smov (!%p54_p0, %s56_s28), %s9629_s24   the second, if p54 holds
  %s179_s29 = sld [smem:[#allocation3 + %s9775_s6]]
  %19 = dma.hbm_to_smem (!%p3_p1), %s17_s11, 16, %s9635_s15, [#allocation2]
  %40 = sbr.rel (!%p38_p2) target = $region127

of which %s53 is a value with a single definition and _s27 its register.
"""

from collections.abc import Callable, Sequence
import dataclasses
import operator
import re
from typing import Any, TypeAlias

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_INSTRUCTION = re.compile(
    r"(?:%(?P<name>[a-z]*\d+)\w* = )?(?P<op>[a-z][\w.]*)\s*"
    r"(?:\[(?:thread|resolvable):[^\]]*\]\s*)?(?P<guard>\([^)]*\))?,?\s*(?P<rest>.*)",
    re.DOTALL,
)
_REGISTER = re.compile(r"%([a-z]*\d+)")
_TARGET = re.compile(r"\$region(\d+)")
# A store names its address first, and no comma after it.
_LATE_GUARD = re.compile(r"(\[smem:.*\]\]\s+)(\([^)]*\)),?\s*(.*)")
_SEPARATOR = re.compile(r",\s*|(?<=\]\])\s+")
_MASK = 0xFFFFFFFF


# A number of 32 bits, a truth, what a division gives, or `UNKNOWN`.
Value: TypeAlias = Any
_Operation = Callable[..., Value]


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction; operands as they are written.

  Attributes:
    name: The value that it defines, or "".
    op: Its mnemonic, without what comes after a type.
    guard: The predicate that it depends on, or "".
    old: What it yields where the guard does not hold, or "".
    operands: The rest.
    target: Region that a branch goes to, or None.
  """

  name: str
  op: str
  guard: str
  old: str
  operands: tuple[str, ...]
  target: int | None

  @property
  def reads(self) -> set[str]:
    """Names of the values that it depends on."""
    texts = (self.guard, self.old, *self.operands)
    return {name for text in texts for name in _REGISTER.findall(text)}

  @property
  def is_copy_to_smem(self) -> bool:
    """Whether scalar memory is written by a copy."""
    return self.op.startswith("dma.") and self.op.endswith("_to_smem")


def parse(bundle: str) -> list[Instruction]:
  """Reads the instructions of a bundle that are not the vector unit's."""
  text = _COMMENT.sub("", bundle).strip().removesuffix("}")
  found = []
  for part in text.split(";;"):
    match = _INSTRUCTION.match(part.strip())
    if match is None or match["op"].startswith("v"):
      continue
    target = _TARGET.search(match["rest"])
    rest, guard = match["rest"].strip(), match["guard"] or ""
    # In a store the guard comes after the address.
    if late := _LATE_GUARD.match(rest):
      rest, guard = late[1] + late[3], late[2]
    guard, _, old = guard.strip("()").partition(",")
    operands = _SEPARATOR.split(rest)
    found.append(
        Instruction(
            match["name"] or "",
            match["op"],
            guard,
            old.strip(),
            () if target else tuple(x.strip() for x in operands),
            int(target[1]) if target else None,
        )
    )
  return found


class Unknown:
  """What the scalars of a schedule do not tell: data of vectors, addresses."""

  def _same(self, *_: object) -> "Unknown":
    return self

  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
  __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _same
  __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _same
  __lt__ = __le__ = __gt__ = __ge__ = _same


UNKNOWN = Unknown()


def _signed(x: int) -> int:
  return ((x & _MASK) ^ 0x80000000) - 0x80000000


def _compare(test: Callable[[Any, Any], Any], is_signed: bool) -> _Operation:
  cast = _signed if is_signed else lambda x: x & _MASK

  def compare(x: Value, y: Value) -> Value:
    if x is UNKNOWN or y is UNKNOWN:
      return UNKNOWN
    return test(cast(x), cast(y))

  return compare


def _both(x: Value, y: Value) -> Value:
  if x is UNKNOWN or y is UNKNOWN:  # One that fails is enough.
    known = y if x is UNKNOWN else x
    return UNKNOWN if known is UNKNOWN or known else False
  return x and y


def _not(x: Value) -> Value:
  return UNKNOWN if x is UNKNOWN else not x


def _choose(predicate: Value, x: Value, y: Value) -> Value:
  if predicate is UNKNOWN:
    return x if x is y else UNKNOWN
  return x if predicate else y


def _shift_left(x: Value, y: Value) -> Value:
  return (x << y) & _MASK


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
# Numbers are kept as the 32 bits without a sign.
OPERATIONS: dict[str, Callable[..., Any]] = {
    # The quotient is popped first, then the remainder.
    "sdivrem.u32": (
        lambda x, y: UNKNOWN if UNKNOWN in (x, y) else list(divmod(x, y))
    ),
    "spop.drf": lambda x: UNKNOWN if x is UNKNOWN else x.pop(0),
    "smov": lambda x: x,
    "pmov": lambda x: x,
    "int_to_ptr": lambda x: x,
    "scalar_lea": lambda *x: sum(x) & _MASK,
    "scalar_select": _choose,
    "sadd.s32": lambda x, y: (x + y) & _MASK,
    "ssub.s32": lambda x, y: (x - y) & _MASK,
    "smul.u32": lambda x, y: (x * y) & _MASK,
    "smul.s32": lambda x, y: (x * y) & _MASK,
    "smulhi.u32": lambda x, y: ((x & _MASK) * (y & _MASK)) >> 32,
    "sand.u32": lambda x, y: x & y,
    "sor.u32": lambda x, y: x | y,
    "sxor.u32": lambda x, y: x ^ y,
    "sshll.u32": _shift_left,
    "sshrl.u32": lambda x, y: x >> y,
    "sshra.s32": lambda x, y: (_signed(x) >> y) & _MASK,
    "pneg": _not,
    "por": lambda x, y: _not(_both(_not(x), _not(y))),
    "pand": _both,
    "pnand": lambda x, y: _not(_both(x, y)),
    "pxor": lambda x, y: _not(x) if y is True else x if y is False else UNKNOWN,
    "smin.u32": lambda x, y: _choose(_compare(operator.lt, False)(x, y), x, y),
    "smax.u32": lambda x, y: _choose(_compare(operator.gt, False)(x, y), x, y),
    "smin.s32": lambda x, y: _choose(_compare(operator.lt, True)(x, y), x, y),
    "smax.s32": lambda x, y: _choose(_compare(operator.gt, True)(x, y), x, y),
}
OPERATIONS |= {
    f"scmp.{name}.{kind}32.totalorder": _compare(
        getattr(operator, name), kind == "s"
    )
    for name in _COMPARISONS
    for kind in "su"
}


def operation(op: str) -> Callable[..., Any] | None:
  """What computes a mnemonic from its operands; None if it is not scalar."""
  stem = op.split(".")[0]
  return OPERATIONS.get(stem if stem in ("int_to_ptr", "scalar_lea") else op)


def constant(text: str, allocations: dict[str, int]) -> int | bool | None:
  """The value of an operand that is no register; addresses are made up.

  Args:
    text: 4, $0x1, or #allocation3.
    allocations: Numbers of those met so far; is added to.

  Returns:
    None if it is something else.
  """
  if text.startswith("#"):
    number = allocations.setdefault(text, len(allocations))
    return (number + 1) << 20
  for prefix, base in (("$0x", 16), ("", 10)):
    if text.startswith(prefix):
      try:
        return int(text.removeprefix(prefix), base) & _MASK
      except ValueError:
        return None
  return None


def terms(text: str) -> Sequence[str]:
  """Parts of an address such as [smem:[#allocation3 + %s9_s6 + $0x1]]."""
  return re.sub(r"\[smem:|[\[\]]", "", text).split(" + ")
