"""Archives that unpack to too much, or claim to, are refused by headers."""

import io
import pathlib
import tracemalloc
import zipfile

from absl.testing import absltest
import numpy as np

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import npz_file


class ReadTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / "a.npz"

  def test_arrays_are_what_was_written(self):
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.float32(2), "c": [""]}
    for save in (np.savez, np.savez_compressed):
      save(self.path, **arrays)
      found = npz_file.read(self.path)
      self.assertEqual([*found], [*arrays])
      for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)

  def test_what_unpacks_to_too_much_is_not_unpacked(self):
    np.savez_compressed(self.path, a=np.zeros(2**20), b=np.zeros(2**20))
    tracemalloc.start()
    with self.assertRaisesRegex(errors.UserError, "unpacks to 16777.* bytes"):
      npz_file.read(self.path, most_bytes=2**23)
    self.assertLess(tracemalloc.get_traced_memory()[1], 2**20)
    tracemalloc.stop()

  def test_a_header_that_claims_more_than_there_is_is_not_believed(self):
    buffer = io.BytesIO()
    for shape in ((10**12,), (2**32, 2**32), (3,)):
      buffer.seek(0)
      header = {"descr": "<f8", "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(buffer, header)
      with zipfile.ZipFile(self.path, "w") as archive:
        archive.writestr("a.npy", buffer.getvalue() + bytes(16))
      with self.assertRaisesRegex(errors.UserError, "a.npy has .* bytes, not"):
        npz_file.read(self.path)

  def test_what_is_no_archive_of_arrays_is_one_sentence(self):
    folder = self.path.parent
    contents = {
        "text": b"no archive",
        "zip": b"PK\x03\x04 no zip",
        "empty": b"",
    }
    for name, content in contents.items():
      (folder / name).write_bytes(content)
    np.savez(folder / "objects", a=np.array([{}], object))
    with zipfile.ZipFile(folder / "other", "w") as archive:
      archive.writestr("a.npy", b"\x93NUMPY\x09\x09")
    names = [*contents, "objects.npz", "other", "absent", "."]
    for name in names:
      with self.assertRaisesRegex(errors.UserError, "no readable .npz: "):
        npz_file.read(folder / name)


if __name__ == "__main__":
  absltest.main()
