"""Where a kernel runs in the tests: compiled on its chip, else interpreted."""

import contextlib

from kernels_pallas import implementations
from kernels_pallas import interpret

PLATFORM_OF = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def is_interpreted(implementation: str) -> bool:
  """Whether the kernel is one of a chip that this machine has not."""
  needed = PLATFORM_OF.get(implementation)
  return needed not in (None, implementations.current_platform())


def mode_of(implementation: str) -> contextlib.AbstractContextManager[None]:
  """What a law calls an implementation in.

  A kernel of this machine's chip is compiled; one of another chip is
  interpreted. XLA's implementations and the references run as they are.
  """
  if is_interpreted(implementation):
    return interpret.interpreted()
  return contextlib.nullcontext()
