"""How orbax writes and reads the list of checksums."""

from collections.abc import Awaitable
from typing import Any

from orbax.checkpoint.experimental import v1 as ocp

from scansnap_jax.experiment.saved import leaves


class DigestHandler(ocp.handlers.CheckpointableHandler[Any, None]):
  """JSON, in the file that handlers of orbax's v0 API gave it."""

  def __init__(self):
    self._json = ocp.handlers.JsonHandler(filename=leaves.DIGEST)

  async def save(
      self,
      directory: ocp.path.PathAwaitingCreation,
      checkpointable: Any,
  ) -> Awaitable[None]:
    """Starts to write; orbax awaits what is returned."""
    return await self._json.save(directory, checkpointable)

  async def load(
      self,
      directory: ocp.path.Path,
      abstract_checkpointable: None = None,
  ) -> Awaitable[Any]:
    """Starts to read; orbax awaits what is returned."""
    return await self._json.load(directory)

  async def metadata(self, directory: ocp.path.Path) -> None:
    """There is none."""

  def is_handleable(self, checkpointable: Any) -> bool:
    """Whether JSON holds it."""
    return self._json.is_handleable(checkpointable)

  def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
    """Orbax asks before it loads; None leaves it open."""
    return self._json.is_abstract_handleable(abstract_checkpointable)
