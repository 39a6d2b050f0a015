"""Methods by the names that flags give them: NAME, NAME:SPREAD, NAME:SPREAD:B.

SPREAD says how a budget is shared out: `even` takes the same share everywhere,
`split` shares each layer's part out between the inputs of its matrices,
`layers` shares it out over layers too. B is the neurons of a block. Imports no
jax.
"""

import dataclasses

from scansnap_jax.experiment import errors

SPREADS = ("even", "split", "layers")
# By inputs: they alone have something to split within a layer.
BY_INPUTS = ("teal", "rsparse")
CHOOSERS = ("oracle", "sketch", "int4_scores", "int4_filled", "output_error")
# All weights in few bits: they have no budget.
WHOLE = ("int8", "int6", "int4")
NAMES = (*BY_INPUTS, "teal_attention", "cats", *CHOOSERS, *WHOLE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """One method.

  Attributes:
    name: One of `NAMES`.
    spread: One of `SPREADS`.
    block_size: Neurons of a block.
  """

  name: str
  spread: str = "even"
  block_size: int = 1


def parse(text: str) -> Spec:
  """Returns the method of a name.

  Raises:
    UserError: There is none.
  """
  name, _, rest = text.partition(":")
  spread, _, block = rest.partition(":")
  if name not in NAMES:
    raise errors.UserError(
        f"methods: {text!r} begins with none of {', '.join(NAMES)}."
    )
  spread = spread or "even"
  if spread not in SPREADS or (spread == "split" and name not in BY_INPUTS):
    raise errors.UserError(
        f"methods: {text!r} must say even or layers after its first colon, or"
        f" split after {' or '.join(BY_INPUTS)}."
    )
  if block and (name not in CHOOSERS or not block.isdecimal() or block == "0"):
    raise errors.UserError(
        f"methods: {text!r} must end with the neurons of a block, a whole"
        f" number above 0, and begin with one of {', '.join(CHOOSERS)}."
    )
  return Spec(name=name, spread=spread, block_size=int(block or 1))
