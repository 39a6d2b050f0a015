import dataclasses
import enum
import json
import math
import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from scansnap_jax.experiment import errors
from scansnap_jax.experiment import workdir


class Kind(enum.Enum):
  SMALL = 1


@dataclasses.dataclass(frozen=True)
class Inner:
  lr_z: float = 0.5
  sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
  seed: int = 3
  kind: Kind = Kind.SMALL
  cap: float | None = None
  inner: Inner = Inner()


_CONFIG = {"seed": 3, "inner": {"lr_z": 0.5, "sizes": [1, 2]}}


def _contents(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


class ClaimTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.parent = pathlib.Path(self.create_tempdir().full_path)
    self.path = self.parent / "a" / "run"

  def test_new_folder_gets_config_and_flags(self):
    found = workdir.claim(self.path, _CONFIG, "--seed=3\n")
    self.assertEqual(found, self.path)
    contents = _contents(self.path)
    self.assertEqual(json.loads(contents.pop("config.json")), _CONFIG)
    self.assertEqual(contents, {"flags.txt": b"--seed=3\n"})

  def test_same_config_resumes_and_changes_nothing(self):
    workdir.claim(self.path, _CONFIG, "--seed=3\n")
    (self.path / "metrics.jsonl").write_text("rows")
    before = _contents(self.path)
    # A tuple is the list that JSON makes of it.
    config = {"seed": 3.0, "inner": {"lr_z": 0.5, "sizes": (1, 2)}}
    workdir.claim(self.path, config, "--other\n")
    self.assertEqual(_contents(self.path), before)

  def test_a_setting_that_is_no_more_wants_the_version_that_had_it(self):
    workdir.claim(self.path, _CONFIG | {"use_remat": False}, "--seed=3\n")
    with self.assertRaisesRegex(
        errors.UserError,
        "use_remat: false there, absent here. Give another --workdir, or resume"
        " it with the version that began it",
    ):
      workdir.claim(self.path, _CONFIG, "--seed=3\n")

  def test_other_config_is_refused_by_field_and_changes_nothing(self):
    workdir.claim(self.path, _CONFIG, "--seed=3\n")
    before = _contents(self.path)
    config = {"seed": 3, "inner": {"lr_z": 1.0, "sizes": [1, 2]}}
    with self.assertRaisesRegex(
        errors.UserError,
        "other settings: inner.lr_z: 0.5 there, 1.0 here. Give another"
        " --workdir, or the settings there",
    ):
      workdir.claim(self.path, config, "--seed=4\n")
    self.assertEqual(_contents(self.path), before)

  def test_folder_of_something_else_is_refused_by_what_it_holds(self):
    for name in ("thesis.tex", "b", "c", "d"):
      (self.parent / name).touch()
    with self.assertRaisesRegex(
        errors.UserError, "holds b, c, d and 1 more but no config.json"
    ):
      workdir.claim(self.parent, _CONFIG, "")
    self.assertLen(list(self.parent.iterdir()), 4)

  def test_claim_that_was_killed_is_taken_up(self):
    self.path.mkdir(parents=True)
    (self.path / ".config.json.123.tmp").write_text("{")
    workdir.claim(self.path, _CONFIG, "--seed=3\n")
    (self.path / "flags.txt").unlink()
    workdir.claim(self.path, _CONFIG, "--seed=3\n")
    self.assertEqual((self.path / "flags.txt").read_text(), "--seed=3\n")

  @parameterized.parameters(b"", b"{", b"\xff", b"[1]")
  def test_damaged_config_is_reported_and_left(self, content):
    self.path.mkdir(parents=True)
    (self.path / "config.json").write_bytes(content)
    with self.assertRaisesRegex(errors.UserError, "config.json cannot be read"):
      workdir.claim(self.path, _CONFIG, "")
    self.assertEqual(_contents(self.path), {"config.json": content})

  def test_file_is_refused(self):
    file = self.parent / "file"
    file.touch()
    for path in (file, file / "below"):
      with self.assertRaisesRegex(errors.UserError, f"--workdir={path} cannot"):
        workdir.claim(path, _CONFIG, "")

  def test_folder_that_is_not_writable_is_refused(self):
    # By a patch, since to root every folder is writable.
    with mock.patch.object(os, "access", return_value=False):
      with self.assertRaisesRegex(errors.UserError, "is not writable"):
        workdir.claim(self.parent, _CONFIG, "")

  @parameterized.parameters("gs://bucket/run", "")
  def test_path_that_is_not_local_is_refused(self, path):
    with self.assertRaisesRegex(errors.UserError, "is no local folder"):
      workdir.claim(path, _CONFIG, "")

  def test_name_that_is_no_utf8_is_refused_before_it_is_made(self):
    name = os.fsdecode(os.fsencode(self.parent) + b"/a\xff")
    with self.assertRaisesRegex(errors.UserError, "is no UTF-8; give a name"):
      workdir.claim(name, _CONFIG, "")
    self.assertEmpty([*self.parent.iterdir()])

  def test_home_is_expanded(self):
    with mock.patch.dict(os.environ, {"HOME": str(self.parent)}):
      found = workdir.claim("~/run", _CONFIG, "")
    self.assertEqual(found, self.parent / "run")


class DescribeDifferenceTest(parameterized.TestCase):

  @parameterized.parameters(
      ({"a": 1}, {"a": 1}, []),
      ({"a": 1}, {"a": 1.0}, []),
      ({"lr_z": 0.5}, {"lr_z": 1.0}, ["lr_z: 0.5 there, 1.0 here"]),
      ({"a": 1}, {"a": True}, ["a: 1 there, true here"]),
      ({"a": None}, {}, ["a: null there, absent here"]),
      ({}, {"a": "x"}, ['a: absent there, "x" here']),
      ({}, {"a": None, "b": {"c": None}}, []),
      ({"a": [1, 2]}, {"a": [1]}, ["a: [1, 2] there, [1] here"]),
      (
          {"a": {"b": 1, "c": 2}},
          {"a": {"b": 1, "c": 3}},
          ["a.c: 2 there, 3 here"],
      ),
      ({"a": {}}, {"a": 1}, ["a: {} there, 1 here"]),
      # Seeds of 64 bits differ although they are equal as floats.
      ({"a": 2**63}, {"a": 2**63 + 1}, [f"a: {2**63} there, {2**63 + 1} here"]),
      (
          {"b": 1, "a": 1},
          {"c": 1, "a": 2, "b": 2},
          [
              "b: 1 there, 2 here",
              "a: 1 there, 2 here",
              "c: absent there, 1 here",
          ],
      ),
  )  # pyformat: disable
  def test_lines_name_the_field_and_both_values(self, there, here, expected):
    self.assertEqual(workdir.describe_difference(there, here), expected)


class ConfigToJsonTest(parameterized.TestCase):

  def test_config_becomes_plain_json(self):
    plain = workdir.config_to_json(Config())
    self.assertEqual(
        plain,
        {
            "seed": 3,
            "kind": "small",
            "cap": None,
            "inner": {"lr_z": 0.5, "sizes": [1, 2]},
        },
    )
    self.assertEqual(json.loads(json.dumps(plain)), plain)

  def test_infinity_is_text(self):
    plain = workdir.config_to_json({"cap": (math.inf, -math.inf)})
    self.assertEqual(
        json.dumps(plain, allow_nan=False), '{"cap": ["inf", "-inf"]}'
    )

  def test_value_without_json_is_refused(self):
    with self.assertRaisesRegex(TypeError, "no JSON for a set"):
      workdir.config_to_json(Config(seed={1}))


def _make_odd(path, kind):
  """Puts what is no regular file at a path."""
  if kind == "folder":
    path.mkdir()
  elif kind == "fifo":
    os.mkfifo(path)
  else:
    path.symlink_to(path.with_name("absent"))


class OddFilesTest(parameterized.TestCase):

  @parameterized.parameters("folder", "fifo", "dangling link")
  def test_a_config_that_is_no_file_is_named(self, kind):
    folder = pathlib.Path(self.create_tempdir().full_path)
    _make_odd(folder / "config.json", kind)
    with self.assertRaisesRegex(errors.UserError, "config.json cannot be read"):
      workdir.claim(folder, {"a": 1}, "--a=1")

  @parameterized.parameters("[" * 100_000, "[]", "null", "")
  def test_a_config_that_is_no_object_is_named(self, text):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "config.json").write_text(text)
    with self.assertRaisesRegex(errors.UserError, "config.json cannot be read"):
      workdir.claim(folder, {"a": 1}, "--a=1")


class WriteAtomicTest(parameterized.TestCase):

  @parameterized.parameters(("ä\n", "ä\n".encode()), (b"\x00\xff", b"\x00\xff"))
  def test_content_replaces_what_was_there(self, content, expected):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "file").write_text("something longer than the new content")
    workdir.write_atomic(folder / "file", content)
    self.assertEqual(_contents(folder), {"file": expected})

  def test_failed_write_leaves_the_old_content_alone(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "file").write_text("old")
    with mock.patch.object(os, "fsync", side_effect=OSError("disk full")):
      with self.assertRaisesRegex(errors.UserError, "file cannot .* disk full"):
        workdir.write_atomic(folder / "file", "new")
    self.assertEqual(_contents(folder), {"file": b"old"})

  @parameterized.parameters("folder", "fifo", "device")
  def test_what_is_no_file_keeps_its_place(self, kind):
    path = pathlib.Path(self.create_tempdir().full_path) / "file"
    if kind == "device":
      path.symlink_to(os.devnull)  # What root could replace.
    else:
      _make_odd(path, kind)
    with self.assertRaisesRegex(errors.UserError, f"{path} is .* file"):
      workdir.write_atomic(path, "new")
    self.assertFalse(path.is_file())

  def test_who_reads_meanwhile_reads_the_whole_old_file(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "file").write_text("old")
    with open(folder / "file") as reader:
      workdir.write_atomic(folder / "file", "new and longer")
      self.assertEqual(reader.read(), "old")


class CheckCanBeMadeTest(absltest.TestCase):

  def test_parents_may_be_absent_and_must_not_be_files(self):
    root = pathlib.Path(self.create_tempdir().full_path)
    (root / "file").write_text("")
    for name in ("a", "a/b/c"):
      workdir.check_can_be_made(root / name, "--out")
      self.assertEqual([path.name for path in root.iterdir()], ["file"])
    for name in ("file/a", "file/a/b"):
      with self.assertRaisesRegex(
          errors.UserError, "^--out=.*/file/a.* cannot be made: .*/file is no"
      ):
        workdir.check_can_be_made(root / name, "--out")


class LockTest(parameterized.TestCase):

  @parameterized.parameters("folder", "fifo", "dangling link")
  def test_a_lock_that_is_no_file_is_named(self, kind):
    folder = pathlib.Path(self.create_tempdir().full_path)
    _make_odd(folder / ".lock", kind)
    with self.assertRaisesRegex(errors.UserError, r"\.lock "):
      with workdir.lock(folder):
        pass

  def test_who_came_between_the_check_and_the_lock_has_the_folder(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    lock = workdir.lock

    def late(path):
      workdir.claim(path, {"seed": 4}, "--seed=4\n")
      return lock(path)

    with mock.patch.object(workdir, "lock", late):
      with self.assertRaisesRegex(errors.UserError, "seed: 4 there, 3 here"):
        with workdir.hold(folder, _CONFIG, "--seed=3\n"):
          self.fail("it is another's")
    self.assertEqual((folder / "flags.txt").read_text(), "--seed=4\n")

  def test_a_run_that_was_refused_before_it_made_anything_lets_go(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for seed in (3, 4):
      with self.assertRaisesRegex(errors.UserError, "too short"):
        with workdir.hold(folder, {"seed": seed}, f"--seed={seed}\n"):
          raise errors.UserError("length=9 is too short")
      self.assertEqual([*_contents(folder)], [".lock"])

  def test_a_run_that_made_something_keeps_its_folder(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(errors.UserError, "diverged"):
      with workdir.hold(folder, {"seed": 3}, "--seed=3\n"):
        (folder / "metrics.jsonl").touch()
        raise errors.UserError("diverged")
    before = _contents(folder)
    with self.assertRaisesRegex(errors.UserError, "seed: 3 there, 4 here"):
      with workdir.hold(folder, {"seed": 4}, "--seed=4\n"):
        self.fail("it is another's")
    self.assertEqual(_contents(folder), before)

  def test_a_run_that_was_begun_before_keeps_its_folder(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    workdir.claim(folder, {"seed": 3}, "--seed=3\n")
    with self.assertRaisesRegex(errors.UserError, "no network"):
      with workdir.hold(folder, {"seed": 3}, "--seed=3\n"):
        raise errors.UserError("no network")
    self.assertEqual((folder / "flags.txt").read_text(), "--seed=3\n")

  def test_a_folder_of_something_else_gets_no_lock(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / "thesis.tex").touch()
    with self.assertRaisesRegex(errors.UserError, "holds thesis.tex"):
      with workdir.hold(folder, _CONFIG, ""):
        self.fail("it is someone's")
    self.assertEqual([*_contents(folder)], ["thesis.tex"])
    (folder / "thesis.tex").unlink()
    (folder / ".lock").touch()  # Left by a run that was killed there.
    with workdir.hold(folder, _CONFIG, "") as found:
      self.assertEqual(found, folder)
      with self.assertRaisesRegex(errors.UserError, "another run is at work"):
        with workdir.hold(folder, _CONFIG, ""):
          self.fail("it is held")

  def test_a_second_run_is_refused_until_the_first_ends(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    with workdir.lock(folder):
      with self.assertRaisesRegex(errors.UserError, "another run is at work"):
        with workdir.lock(folder):
          pass
    with workdir.lock(folder):
      pass


if __name__ == "__main__":
  absltest.main()
