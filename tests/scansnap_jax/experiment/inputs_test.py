import hashlib
import json
import pathlib

from absl.testing import absltest

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import inputs


class RecordTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def test_what_was_read_is_written_and_found_again(self):
    inputs.record(self.folder, {"a.txt": "12", "b.txt": "34"})
    written = (self.folder / "inputs.json").read_text()
    self.assertEqual(json.loads(written), {"a.txt": "12", "b.txt": "34"})
    inputs.record(self.folder, {"a.txt": "12", "b.txt": "34"})
    self.assertEqual((self.folder / "inputs.json").read_text(), written)

  def test_a_file_may_have_moved(self):
    inputs.record(self.folder, {"here/a.txt": "12"})
    inputs.record(self.folder, {"there/a.txt": "12"})

  def test_other_content_is_refused_by_name(self):
    inputs.record(self.folder, {"a.txt": "12", "b.txt": "34"})
    with self.assertRaisesRegex(
        errors.UserError,
        "^b.txt is not what .* began with: sha256 34 then, sha256 56 now",
    ):
      inputs.record(self.folder, {"a.txt": "12", "b.txt": "56"})

  def test_one_more_file_is_refused(self):
    inputs.record(self.folder, {"a.txt": "12"})
    with self.assertRaisesRegex(errors.UserError, "c.txt .* not read then"):
      inputs.record(self.folder, {"a.txt": "12", "c.txt": "1"})

  def test_the_order_matters(self):
    inputs.record(self.folder, {"train": "1", "valid": "2"})
    with self.assertRaisesRegex(errors.UserError, "another order"):
      inputs.record(self.folder, {"valid": "2", "train": "1"})

  def test_a_damaged_record_is_refused(self):
    (self.folder / "inputs.json").write_text("[")
    with self.assertRaisesRegex(errors.UserError, "is not JSON"):
      inputs.record(self.folder, {"a.txt": "12"})


class Sha256Test(absltest.TestCase):

  def test_is_that_of_the_bytes(self):
    path = pathlib.Path(self.create_tempfile().full_path)
    data = bytes(range(256)) * 10_000  # More than a block.
    path.write_bytes(data)
    self.assertEqual(inputs.sha256(path), hashlib.sha256(data).hexdigest())

  def test_a_name_stands_before_it_as_it_was_given(self):
    file = self.create_tempfile(content="abc").full_path
    digest = hashlib.sha256(b"abc").hexdigest()
    self.assertEqual(inputs.named_sha256(file), f"{file}, sha256 {digest}")

  def test_a_folder_is_refused(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, "is a folder"):
      inputs.sha256(folder)


if __name__ == "__main__":
  absltest.main()
