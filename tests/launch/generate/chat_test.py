"""`launch.generate --chat` as somebody in a terminal has it."""

import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import time

from absl.testing import absltest
import pytest

from tests.launch import generate_test

_ROOT = pathlib.Path(__file__).parents[3]
_TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"


class _Terminal:
  """A script whose stdin and stdout are a terminal."""

  def __init__(self, *arguments):
    self.shown = b""
    self._end, other = pty.openpty()
    self.script = subprocess.Popen(
        [sys.executable, "-m", "launch.generate", *arguments],
        cwd=_ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdin=other,
        stdout=other,
        stderr=other,
    )
    os.close(other)

  def wait_for(self, text, seconds=120):
    """Reads until a text has come, or the script has ended."""
    deadline, start = time.monotonic() + seconds, len(self.shown)
    while text is None or text not in self.shown[start:]:
      if time.monotonic() > deadline:
        raise TimeoutError(f"{text} is not in {self.shown[start:]}")
      if not select.select([self._end], [], [], 1)[0]:
        continue
      try:
        found = os.read(self._end, 4096)
      except OSError:  # What Linux says at the end of a terminal.
        found = b""
      if not found:
        break
      self.shown += found

  def say(self, line):
    self.wait_for(b"> ")
    os.write(self._end, line)

  def end(self):
    """Returns the exit status."""
    self.wait_for(None)
    os.close(self._end)
    return self.script.wait()


class ChatTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    folder = self.create_tempdir()
    generate_test.save_model(pathlib.Path(folder.full_path))
    self.folder = folder

  @pytest.mark.slow
  def test_lines_are_answered_until_stdin_ends(self):
    self.folder.create_file("chat_template.jinja", content=_TEMPLATE)
    terminal = _Terminal(
        f"--model={self.folder.full_path}", "--chat", "--max_new_tokens=3"
    )
    terminal.say(b"hello\n")
    terminal.say(b"\n")
    terminal.say("héé 🙂\n".encode())
    terminal.say(b"\xff\xfe\n")
    terminal.say(b"still there?\n")
    terminal.say(b"\x04")  # Ctrl-D.
    self.assertEqual(terminal.end(), 0, terminal.shown)
    self.assertEqual(terminal.shown.count(b"error: "), 1, terminal.shown)
    self.assertIn(b"bytes that are no UTF-8", terminal.shown)
    self.assertNotIn(b"Traceback", terminal.shown)

  @pytest.mark.slow
  def test_ctrl_c_is_one_line_and_its_status(self):
    self.folder.create_file("chat_template.jinja", content=_TEMPLATE)
    terminal = _Terminal(f"--model={self.folder.full_path}", "--chat")
    terminal.wait_for(b"> ")
    terminal.script.send_signal(signal.SIGINT)
    self.assertEqual(terminal.end(), 130, terminal.shown)
    self.assertIn(b"stopped by Ctrl-C", terminal.shown)

  @pytest.mark.slow
  def test_without_a_template_it_ends_with_one_line(self):
    terminal = _Terminal(f"--model={self.folder.full_path}", "--chat")
    self.assertEqual(terminal.end(), 2)
    self.assertIn(b"has no chat template", terminal.shown)
    self.assertEqual(terminal.shown.count(b"\n"), 1, terminal.shown)


if __name__ == "__main__":
  absltest.main()
