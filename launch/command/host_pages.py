"""The flag that keeps a KV cache in the memory of an accelerator's host."""

from collections.abc import Callable
from typing import Any

from absl import flags

from scansnap_jax.experiment import errors


def define() -> flags.FlagHolder[Any]:
  """Defines --host_page."""
  return flags.DEFINE_integer(
      "host_page",
      None,
      "Keeps the KV cache in the memory of the accelerator's host, in pages of"
      " so many tokens, which come to the device one by one; for"
      " --policy=full.",
      1,
  )


def check(page_size: int | None, **others: bool) -> None:
  """Refuses flags that do not go with it; `others` says which are given."""
  if page_size is None:
    return
  for name, is_given in others.items():
    if is_given:
      raise errors.UserError(
          f"--host_page={page_size} keeps all of a few texts for one device and"
          f" does not go with --{name}: leave one of them out."
      )


def check_backend(page_size: int | None) -> None:
  """Refuses a backend without a memory of its own; starts it."""
  if page_size is None:
    return
  import jax

  from joma.inference.cache import host_pages

  host_pages.check_device(jax.default_backend())


def caches(
    page_size: int | None,
    make_cache: Callable[..., Any] | None,
    config: Any,
    batch_size: int,
    num_positions: int,
    dtype: str,
) -> Any:
  """Empty caches, one a layer: a policy's, or in the host; else None."""
  if make_cache is not None:
    return make_cache(config, batch_size=batch_size, dtype=dtype)
  if page_size is None:
    return None
  from joma.inference.cache import host_pages

  return host_pages.init(
      config, batch_size, num_positions, dtype, page_size=page_size
  )
