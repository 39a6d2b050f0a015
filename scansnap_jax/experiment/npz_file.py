"""Archives of arrays that others wrote: sizes are read before the arrays.

A few megabytes can unpack to more than any memory, and a header of 100 bytes
can claim an array of any size.
"""

import io
import pathlib
import zipfile
import zlib

import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import json_file

_MOST_BYTES = 2**31
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, AttributeError)
# Of an archive that is no zip, cut short, encrypted, or packed unusually.
_UNREADABLE += (zipfile.BadZipFile, zlib.error, RuntimeError, SyntaxError)


def read(
    path: pathlib.Path, *, most_bytes: int = _MOST_BYTES
) -> dict[str, np.ndarray]:
  """Returns the arrays of an .npz file, by name.

  Args:
    path: Of a regular file.
    most_bytes: Largest size, unpacked, that is read at all.

  Raises:
    UserError: If there is no such file, it is no .npz, holds Python objects, is
      damaged, or unpacks to more than `most_bytes`.
  """
  try:
    json_file.check_regular(path)
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
      size = sum(member.file_size for member in members)
      if size <= most_bytes:
        for member in members:
          _check_header(archive, member)
        with np.load(path, allow_pickle=False) as arrays:
          return {name: arrays[name] for name in arrays.files}
  except (*_UNREADABLE, errors.UserError) as error:
    raise errors.UserError(f"{path} is no readable .npz: {error}") from error
  raise errors.UserError(
      f"{path} unpacks to {size} bytes; at most {most_bytes} are read."
  )


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
  """Raises ValueError unless an array is as large as its header says."""
  with archive.open(member) as file:
    start = io.BytesIO(file.read(2**16))
  version = np.lib.format.read_magic(start)
  read_header = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
  }.get(version)
  if read_header is None:
    raise ValueError(f"{member.filename} has version {version} of the format")
  shape, _, dtype = read_header(start)
  size = dtype.itemsize
  for length in shape:  # As Python's numbers, which do not wrap around.
    size *= int(length)
  if not dtype.hasobject and size != member.file_size - start.tell():
    raise ValueError(
        f"{member.filename} has {member.file_size} bytes, not those of"
        f" {dtype} {list(shape)}"
    )
