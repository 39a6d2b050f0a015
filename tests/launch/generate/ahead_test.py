"""Guesses and rows: the same texts in another order of work."""

import contextlib
import io
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import flagsaver
import pytest

from launch import generate
from scansnap_jax.experiment import errors
from scansnap_jax.experiment.processes import devices
from tests.launch import generate_test


class AheadTest(absltest.TestCase):

  def _run(self, **flags):
    out, err = io.StringIO(), io.StringIO()
    # This process has its devices already.
    has_devices = mock.patch.object(devices, "set_up")
    with flagsaver.flagsaver(**flags), has_devices:
      with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        generate.main([])
    return out.getvalue(), err.getvalue()

  @pytest.mark.slow
  def test_drafts_and_rows_write_what_is_written_without(self):
    folder = self.create_tempdir().full_path
    generate_test.save_model(pathlib.Path(folder))
    prompts = ["To be or not to be", "or", "that is to be"]
    options = {"model": folder, "prompt": prompts, "max_new_tokens": 9}
    want, _ = self._run(**options)
    for flags in (
        {"draft": "ngram:n=2:least=1:k=3"},
        {"draft_model": folder, "draft": "model:k=3"},
        {"draft_model": folder},
        {"rows": 2},
    ):
      found, told = self._run(**options, **flags)
      self.assertEqual(found, want, flags)
      if "rows" not in flags:
        self.assertRegex(told, r"\d guesses accepted a step \(\d+ of \d+\)")
    evicting = {"policy": "h2o", "capacity": 6}
    want, _ = self._run(**options, **evicting)
    for flags in ({"draft": "ngram"}, {"rows": 2}):
      self.assertEqual(self._run(**options, **evicting, **flags)[0], want)

  def test_what_does_not_go_together_is_refused_first(self):
    for flags, message in (
        ({"draft": "ngram", "rows": 2}, "--draft and --rows do not go"),
        (
            {"draft": "ngram", "prompt": None, "chat": True},
            "--draft and --chat",
        ),
        ({"rows": 2, "mesh": "1,1,1,1"}, "--rows and --mesh do not"),
        ({"draft": "model"}, "--draft=model needs --draft_model=DIR"),
        ({"draft": "ngram:k=0"}, "k must be at least 1, got 0"),
        (
            {"draft": "ngram", "draft_model": "absent"},
            "--draft_model has no effect with --draft=ngram",
        ),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        self._run(**{"model": "unused", "prompt": ["a"]} | flags)


if __name__ == "__main__":
  absltest.main()
