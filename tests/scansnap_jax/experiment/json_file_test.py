import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment import json_file
from scansnap_jax.experiment.errors import UserError


class ReadObjectTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.path = pathlib.Path(self.create_tempdir().full_path) / "config.json"

  def test_an_object_comes_back_with_or_without_byte_order_mark(self):
    for start in (b"", b"\xef\xbb\xbf"):
      self.path.write_bytes(start + json.dumps({"a": [1, "é"]}).encode())
      self.assertEqual(json_file.read_object(self.path), {"a": [1, "é"]})

  @parameterized.parameters(
      (b"[1]", "must hold a JSON object .* got list"),
      (b"null", "must hold a JSON object .* got NoneType"),
      (b"{", "config.json is not JSON"),
      (b'{"a": ' + b"9" * 5000 + b"}", "config.json is not JSON"),
      (b"[" * 100_000, "nested too deeply"),
      (b'{"a": "\xff"}', "config.json is not UTF-8"),
  )
  def test_what_is_no_object_is_refused(self, content, message):
    self.path.write_bytes(content)
    with self.assertRaisesRegex(UserError, message):
      json_file.read_object(self.path)

  def test_more_bytes_than_allowed_are_refused(self):
    self.path.write_text("{} " * 10)
    with self.assertRaisesRegex(UserError, "has 30 bytes; at most 29 are read"):
      json_file.read_object(self.path, most_bytes=29)
    with self.assertRaisesRegex(UserError, "is not JSON"):
      json_file.read_object(self.path, most_bytes=30)

  def test_what_is_no_regular_file_is_refused_and_nothing_hangs(self):
    for make, message in (
        (lambda path: None, "cannot be read: No such file or directory"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("absent"), "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ):
      make(self.path)
      with self.assertRaisesRegex(UserError, message):
        json_file.read_object(self.path)
      if self.path.is_dir():
        self.path.rmdir()
      else:
        self.path.unlink(missing_ok=True)

  def test_names_that_no_file_can_have_are_refused(self):
    for name in ("x" * 10_000, "a\0b"):
      with self.assertRaisesRegex(UserError, "cannot be read"):
        json_file.read_object(self.path.with_name("y") / name)


class NamesTest(absltest.TestCase):

  def test_the_home_of_nobody_is_a_name_like_others(self):
    with mock.patch.dict(os.environ, HOME="/home/me"):
      for name, path in (("~/a", "/home/me/a"), ("~nobody_here/a",) * 2):
        self.assertEqual(json_file.local_path(name), pathlib.Path(path))

  def test_lists_of_paths_are_cut_at_commas_that_are_no_name(self):
    root = self.create_tempdir().full_path
    for name in ("a", "a,b", "c, d,e", "f[1]"):
      os.mkdir(os.path.join(root, name))
    with mock.patch.dict(os.environ, HOME=root):
      for text, want in (
          ("~/a, ~/x ,~/f[1]", ["~/a", "~/x", "~/f[1]"]),
          ("~/a,b,~/c, d,e", ["~/a,b", "~/c, d,e"]),
          ("~nobody_here/a,b", ["~nobody_here/a", "b"]),
          ("x" * 5000 + ",\0", ["x" * 5000, "\0"]),
      ):
        self.assertEqual(json_file.split_paths(text), want)

  def test_a_text_is_read_as_it_is_without_its_byte_order_mark(self):
    path = pathlib.Path(self.create_tempdir().full_path) / "text"
    path.write_bytes(b"\xef\xbb\xbfa\rb\r\nc\n")
    self.assertEqual(json_file.read_text(path), "a\rb\r\nc\n")

  def test_whole_numbers_that_no_float_holds_are_refused(self):
    self.assertEqual(json_file.parse_object('{"a": 12}', "x"), {"a": 12})
    with self.assertRaisesRegex(UserError, "x is .* of 400 digits"):
      json_file.parse_object('{"a": %s}' % ("9" * 400), "x")


if __name__ == "__main__":
  absltest.main()
