"""Code on the pages for users runs, or says why it does not.

A comment before a block says what it is: `not run: why`, `run: slow`, `file:
NAME`, which is written where Python finds it, or `setup: lm` and `setup:
folder`, which make a small model first. Python blocks of a page share their
names and a folder.
"""

import ast
import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import pytest

from joma.inference import language_model
from joma.systems import names as system_names
from joma.systems.cache_policies import names as policy_names
from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from launch import __main__ as command

_ROOT = pathlib.Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?)"
    r" -->\n)?^```(?P<kind>python|bash)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
_PAGES = {
    path.relative_to(_ROOT).as_posix(): path
    for path in (
        _ROOT / "README.md",
        _DOCS / "index.md",
        _DOCS / "start.md",
        *sorted((_DOCS / "howto").glob("*.md")),
    )
}
_MARKS = ("not run: ", "run: slow", "file: ", "setup: ")


@dataclasses.dataclass(frozen=True)
class Block:
  """A block of code.

  Attributes:
    kind: python or bash.
    code: Its lines.
    mark: What the comment before it says; nothing where there is none.
  """

  kind: str
  code: str
  mark: str


def blocks_of(text: str) -> list[Block]:
  """The blocks of a page, in order."""
  return [
      Block(m["kind"], m["code"], m["mark"] or "")
      for m in _BLOCK.finditer(text)
  ]


def _small_model() -> language_model.LanguageModel:
  shape = configs.TransformerConfig(
      vocab_size=256,
      num_layers=2,
      embed_dim=16,
      num_heads=2,
      num_kv_heads=2,
      head_dim=8,
      hidden_dim=16,
      max_len=128,
  )
  model = models.Transformer(shape)
  tokens = jnp.zeros((1, 8), int)
  params = model.init(jax.random.key(0), tokens)["params"]
  return language_model.LanguageModel(model, params, tokenizer.Bytes())


def _setup(what: str, names: dict[str, object]) -> None:
  """Makes the model that a block takes for granted."""
  lm = _small_model()
  if what == "lm":
    names["lm"] = lm
    return
  folder = pathlib.Path("runs/lm_model")
  folder.mkdir(parents=True, exist_ok=True)
  pretrained.save(folder, lm.model.config, lm.params)
  tokenizer.save(lm.tokenizer, folder)


class CodeBlocksTest(parameterized.TestCase):

  @parameterized.parameters(*_PAGES)
  def test_every_block_is_python_or_known(self, name):
    found = blocks_of(_PAGES[name].read_text())
    scripts = command.scripts()
    for block in found:
      if block.mark:
        self.assertTrue(block.mark.startswith(_MARKS), block.mark)
      if block.kind == "python":
        ast.parse(block.code)
        continue
      # No command of a script that is not there.
      for script in re.findall(r"python -m launch\.([\w.]+)", block.code):
        self.assertIn(script, scripts, block.code)
      self.assertTrue(block.mark, f"run it, or say why not: {block.code}")

  @parameterized.parameters(*_PAGES)
  @pytest.mark.slow
  def test_python_of_a_page_runs(self, name):
    folder = pathlib.Path(self.create_tempdir().full_path)
    self.enterContext(contextlib.chdir(folder))
    before = dict(policy_names.POLICIES), dict(system_names.SYSTEMS)
    sys.path.insert(0, str(folder))
    names: dict[str, object] = {"__name__": "page"}
    try:
      for block in blocks_of(_PAGES[name].read_text()):
        self._run(block, names)
    finally:
      sys.path.remove(str(folder))
      for table, old in zip(
          (policy_names.POLICIES, system_names.SYSTEMS), before, strict=True
      ):
        table.clear()
        table.update(old)

  def _run(self, block, names):
    if block.kind != "python" or block.mark.startswith("not run"):
      return
    if block.mark.startswith("file: "):
      pathlib.Path(block.mark.removeprefix("file: ")).write_text(block.code)
      return
    if block.mark.startswith("setup: "):
      _setup(block.mark.removeprefix("setup: "), names)
    with contextlib.redirect_stdout(io.StringIO()):
      exec(compile(block.code, "page", "exec"), names)

  @parameterized.parameters(*_PAGES)
  @pytest.mark.slow
  def test_commands_of_a_page_run(self, name):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for each in ("README.md", "launch"):
      (folder / each).symlink_to(_ROOT / each)
    self.enterContext(contextlib.chdir(folder))
    found = blocks_of(_PAGES[name].read_text())
    if not any(block.mark == "run: slow" for block in found):
      self.skipTest("no command of this page is run")
    for block in found:
      # What a page writes before its commands, such as a file of classes.
      if block.kind == "python" and not block.mark and "savez" in block.code:
        exec(compile(block.code, "page", "exec"), {})
      if block.mark == "run: slow":
        for line in block.code.strip().splitlines():
          self._command(line)

  def _command(self, line):
    words = shlex.split(line)
    if words[0] == "python":
      words[0] = sys.executable
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    self.assertEqual(done.returncode, 0, f"{line}\n{done.stderr[-800:]}")


class MessagesTest(absltest.TestCase):

  def test_messages_are_those_of_the_code(self):
    """Every part of a message of troubleshooting.md stands in a source."""
    text = (_DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]*)` \|", text, re.MULTILINE)
    self.assertGreater(len(messages), 10)
    said = "\n".join(_strings())
    for message in messages:
      for part in message.split("..."):
        self.assertIn(_words(part), said, message)


def _words(text: str) -> str:
  return " ".join(text.split()).strip(" ,")


def _strings() -> set[str]:
  """Text of all strings of the sources, whatever stands in for values."""
  found = set()
  for package in ("scansnap_jax", "joma", "kernels_pallas", "launch"):
    for path in (_ROOT / package).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
          found.add(_words(node.value))
        elif isinstance(node, ast.JoinedStr):
          found.add(_words(_shown(node)))
  return found


def _shown(node: ast.JoinedStr) -> str:
  """An f-string with a mark for each value, or the name of a constant."""
  parts = []
  for part in node.values:
    if isinstance(part, ast.Constant):
      parts.append(str(part.value))
    elif ast.unparse(part).strip("f'\"{}") == "_CONFIG":
      parts.append("config.json")
    elif ast.unparse(part).strip("f'\"{}") == "extra":
      parts.append("hf")
    else:
      parts.append("\0")
  return "".join(parts)


if __name__ == "__main__":
  absltest.main()
