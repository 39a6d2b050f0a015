"""Variable tracking: which variables have a value, through assignments.

RULER (arXiv 2404.06654), section 3.2: `VAR A = 12345`, `VAR B = VAR A` and so
on, hidden in noise; one worked example comes first.
"""

import numpy as np

from joma.inference.evaluation.ruler import hay
from joma.inference.evaluation.ruler import sample as sample_lib
from joma.inference.evaluation.ruler import vocabulary

# Noise around the worked example.
_SHOWN = 2


def draw(
    generator: np.random.Generator,
    size: int,
    *,
    num_chains: int = 1,
    num_hops: int = 4,
    shows: bool = True,
) -> sample_lib.Sample:
  """Draws chains of assignments; the variables of the first are asked.

  Args:
    generator: Of all draws.
    size: Pieces of noise.
    num_chains: Chains, each with a value of its own.
    num_hops: Variables of a chain after its first.
    shows: Whether a worked example, of another chain, comes first.
  """
  before = ""
  if shows:
    shown = draw(
        generator,
        _SHOWN,
        num_chains=num_chains,
        num_hops=num_hops,
        shows=False,
    )
    before = f"{shown.text} {' '.join(shown.answers)}\n\n"
  per_chain = num_hops + 1
  names = vocabulary.variables(generator, num_chains * per_chain)
  values = vocabulary.numbers(generator, num_chains, digits=5)
  chains = [
      names[n * per_chain : (n + 1) * per_chain] for n in range(num_chains)
  ]
  said = [
      [
          f"VAR {name} = {source}"
          for name, source in zip(
              chain, [value, *(f"VAR {x}" for x in chain)], strict=False
          )
      ]
      for chain, value in zip(chains, values, strict=True)
  ]
  # Chains run through each other; each keeps its order.
  turns = generator.permutation(np.repeat(np.arange(num_chains), per_chain))
  left = [iter(lines) for lines in said]
  lines = [next(left[turn]) for turn in turns]
  text = hay.hide(generator, [hay.NOISE] * size, lines, between="\n")
  return sample_lib.Sample(
      context=(
          f"{before}Memorize and track the chain(s) of variable assignment"
          f" hidden in the following text.\n\n{text}"
      ),
      question=(
          "\nQuestion: Find all variables that are assigned the value"
          f" {values[0]} in the text above."
      ),
      prefix=(
          " Answer: According to the chain(s) of variable assignment in the"
          f" text above, {per_chain} variables are assigned the value"
          f" {values[0]}, they are:"
      ),
      answers=tuple(chains[0]),
  )
