"""The version that is installed, asked for as `__version__` of a package."""

_DISTRIBUTION = "scansnap-jax"


def attribute(name: str) -> str:
  """Finds `__version__`, as a package's `__getattr__`.

  Raises:
    AttributeError: Another name is asked for, or the distribution is not
      installed, as in a copy of its source.
  """
  if name != "__version__":
    raise AttributeError(f"there is no {name}")
  # Imported here: all import the packages, and few ask.
  from importlib import metadata

  try:
    return metadata.version(_DISTRIBUTION)
  except metadata.PackageNotFoundError as error:
    raise AttributeError(f"{_DISTRIBUTION} is not installed") from error
