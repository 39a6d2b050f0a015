"""What the `tokenizers` library fails with, as one sentence."""

from collections.abc import Iterator
import contextlib
import os

from scansnap_jax.experiment.errors import UserError


@contextlib.contextmanager
def as_errors() -> Iterator[None]:
  """What the `tokenizers` library fails with becomes one sentence.

  It raises plain Exception, and a panic of its Rust code is no Exception at
  all, but a BaseException of the name PanicException, and writes where it came
  from to the process's standard error.
  """
  try:
    with _no_standard_error():
      yield
  except UserError:
    raise
  except BaseException as error:
    is_panic = type(error).__name__ == "PanicException"
    if not is_panic and not isinstance(error, Exception):
      raise
    raise UserError(f"No tokenizer in this JSON, or it fails: {error}") from (
        error
    )


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
  """Drops what is written to the process's standard error meanwhile."""
  try:
    kept = os.dup(2)
  except OSError:  # It was closed: nothing is shown anyway.
    yield
    return
  try:
    with open(os.devnull, "wb") as nowhere:
      os.dup2(nowhere.fileno(), 2)
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
