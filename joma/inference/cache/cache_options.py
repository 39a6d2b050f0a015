"""How a KV cache keeps keys, and what goes together; imports no jax."""

import dataclasses
from typing import Literal

from joma.transformer import config as configs
from scansnap_jax.experiment import errors
from scansnap_jax.experiment import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
  """How a cache keeps things; static.

  Attributes:
    keys: Whether keys are kept after rotary positions ("rotated", cheaper) or
      before ("raw": turned at every step, which positions that change need).
    positions: "absolute", or "rolled": a token's place among those kept.
    page_size: Slots that are freed together; 1 is one at a time.
  """

  keys: Literal["rotated", "raw"] = "rotated"
  positions: Literal["absolute", "rolled"] = "absolute"
  page_size: int = 1


DEFAULT = CacheOptions()


def resolve(
    config: configs.TransformerConfig,
    keys: str | None,
    positions: str,
    page_size: int,
) -> CacheOptions:
  """Returns the options of `kv_cache.init`, and what follows from the model.

  Raises:
    UserError: If the model has no such positions.
  """
  if positions not in ("absolute", "rolled"):
    raise errors.UserError(
        f"positions={positions!r} must be 'absolute' or 'rolled'."
    )
  if keys not in (None, "rotated", "raw"):
    raise errors.UserError(f"keys={keys!r} must be 'rotated' or 'raw'.")
  require.at_least("page_size", page_size, 1)
  is_rotary = config.positions == "rotary"
  if positions == "rolled" and not is_rotary:
    raise errors.UserError(
        "positions='rolled' turns keys again, which needs rotary positions; the"
        f" model's are {config.positions}."
    )
  kinds = [config.rope_of(layer) for layer in range(config.num_layers)]
  changes = is_rotary and any(kind.changes_with_length for kind in kinds)
  must_be_raw = positions == "rolled" or changes
  if must_be_raw and keys == "rotated":
    raise errors.UserError(
        "keys='rotated' cannot be turned again, which positions='rolled' and"
        " rotary frequencies that change with the text need: use keys='raw'."
    )
  return CacheOptions(
      keys=keys or ("raw" if must_be_raw else "rotated"),
      positions=positions,
      page_size=page_size,
  )


def check_capacity(
    capacity: int, config: configs.TransformerConfig, options: CacheOptions
) -> None:
  """Raises UserError unless a layer can have so many slots."""
  require.at_least("capacity", capacity, 1)
  # Raw keys may be turned to any length.
  is_bounded = config.positions == "learned" or (
      config.positions == "rotary" and options.keys == "rotated"
  )
  if is_bounded and capacity > config.max_len:
    raise errors.UserError(
        f"capacity={capacity} is above the model's {config.max_len} positions:"
        " there is nothing more to keep."
    )
  if capacity % options.page_size:
    raise errors.UserError(
        f"page_size={options.page_size} must divide capacity={capacity}."
    )
