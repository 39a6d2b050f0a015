"""All scripts of `launch`, found by reading it, and their smallest work.

A script that is new is found, and attacked with the flags that its names ask
for, until it gets a line in `_SMALL`.
"""

import ast
from collections.abc import Sequence
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from joma.transformer import config as configs
from joma.transformer import model as models
from joma.transformer.hf import pretrained
from joma.transformer.text import tokenizer
from tests.faults import attacks

_ROOT = pathlib.Path(__file__).parents[2]
# A part of `launch.bench.kernels`, which starts it with arguments of its own.
_INTERNAL = ("launch.bench.ops.cpu",)
_MODEL = configs.TransformerConfig(
    vocab_size=256,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_dim=16,
    max_len=64,
)
TEXT = "to be or not to be, that is the question\n" * 40

TRAIN_LM = (
    *("--model.num_layers=1", "--model.embed_dim=8", "--model.num_heads=1"),
    *("--model.num_kv_heads=1", "--model.head_dim=8", "--model.hidden_dim=8"),
    *("--batch_size=2", "--seq_len=8", "--eval_batch_size=2"),
)
TABLE1 = (
    *("--preset=table1_reduced", "--table1.num_classes=5"),
    *("--table1.num_combinations=2", "--table1.num_latents_0=6"),
    *("--table1.num_latents_1=7", "--table1.num_tokens=20"),
    *("--table1.seq_len=9", "--table1.embed_dim=8", "--table1.num_seeds=2"),
    *("--table1.num_unseen=5", "--table1.num_shuffles=2"),
)
SCANSNAP = (
    *("--preset=sweep", "--num_last=1", "--lr_z=1", "--lr_ratio=2"),
    *("--num_seeds=2", "--batch_size=4", "--data.seq_len=9"),
)
_SMALL_ATTENTION = (
    *("--entries=softmax", "--train_length=8", "--decode_length=8"),
    *("--embed_dim=8", "--num_heads=2", "--num_kv_heads=1"),
    *("--head_dim=4", "--batch_size=1", "--num_rounds=1"),
)
_SMOKE = ("--preset=smoke",)
# The smallest work of each: a second or two. Benchmarks that start processes of
# their own end at a refusal.
_SMALL = {
    "launch.scansnap": _SMOKE,
    "launch.joma": _SMOKE,
    "launch.attention": _SMOKE,
    "launch.train_lm": (*_SMOKE, "--corpus=text.txt"),
    "launch.bridge": (*_SMOKE, "--lm.corpus=text.txt"),
    "launch.contextual_sparsity": _SMOKE,
    "launch.rope_extension": (*_SMOKE, "--corpus=text.txt"),
    "launch.evaluate_cache": _SMOKE,
    "launch.generate": ("--model=model", "--prompt=a", "--max_new_tokens=3"),
    "launch.embed": ("--model=model", "--text=text.txt"),
    "launch.export": ("--workdir=runs/a",),
    "launch.inspect_lm": ("--model=model", "--text=text.txt", "--window=16"),
    "launch.compare_lm": ("--runs=runs/a",),
    "launch.plan": (
        *("--topology=v5e:2x2", "--shape=model", "--task=decode"),
        *("--batch=4", "--seq_len=16", "--mesh=4,1,1"),
    ),
    "launch": ("help",),
    "launch.plan.scaling": (
        *("--chip=v5e", "--num_chips=1,2", "--compiled=", "--shape=model"),
        *("--task=decode", "--batch=2", "--seq_len=16"),
    ),
    "launch.plan.offload": ("--shape=model", "--seq_len=16", "--max_batch=4"),
    "launch.cost_table": ("--lengths=512", "--batch_sizes=1"),
    "launch.bench.attention": _SMALL_ATTENTION,
    "launch.bench_attention": _SMALL_ATTENTION,
    "launch.bench.generate": (
        *("--model=model", "--nopeer", "--batch_sizes=1", "--prompt_len=4"),
        *("--num_rounds=1", "--num_steps=1"),
    ),
    "launch.bench.inference": (
        *("--nopeer", "--batch_sizes=1", "--length=16", "--capacity=8"),
        *("--num_layers=1", "--num_rounds=1", "--num_steps=1"),
    ),
    "launch.bench.joma": (
        *("--embed_dims=8", "--set_sizes=2", "--num_classes=5", "--notorch"),
        *("--num_layers=2", "--seq_len=10", "--batch_size=4"),
        *("--num_rounds=1", "--num_steps=1"),
    ),
    "launch.bench.lm": (
        *("--notorch", "--vocab_size=32", "--embed_dim=8", "--batch_size=2"),
        *("--seq_len=8", "--num_rounds=1", "--num_steps=1"),
    ),
    "launch.bench.language.kvzap_fit": (
        *("--model=model", "--weights=kvzap.npz", "--num_texts=1"),
        *("--num_held_out=2", "--length=4", "--rest=2", "--num_steps=1"),
    ),
    "launch.bench.language.ruler_peer": ("--model=empty",),
    "launch.bench.language.sparsity_times": ("--run=empty",),
    "launch.bench.house": ("--root=empty",),
    "launch.bench.kernels": ("--target=abacus",),
    "launch.bench_kernels": ("--target=abacus",),
    "launch.bench.starts": ("--scripts=abacus",),
    "launch.bench.sampling": ("--vocab_size=16", "--repeats=1"),
    "launch.bench.serving": (
        *("--model=model", "--num_requests=2", "--num_rows=1"),
        *("--prompt_lens=1,2", "--new_tokens=1,2", "--prefix_len=0"),
        "--num_rounds=1",
    ),
    "launch.bench.speculative": (
        *("--model=model", "--ks=1", "--num_new=2", "--num_rounds=1"),
    ),
    "launch.bench.scansnap": ("--what=length", "--seq_lens=0"),
}


# It starts the others.
_WITHOUT_FLAGS = ("launch",)
# They write one file, or folder, and never over another; how its name ends.
_WITH_OUTPUT = {"launch.embed": ".npz", "launch.export": ""}


class Script(NamedTuple):
  """A script of `launch`.

  Attributes:
    module: As `python -m` takes it.
    argv: Flags of its smallest work, in a `World`.
    has_workdir: Whether it wants a --workdir.
  """

  module: str
  argv: Sequence[str]
  has_workdir: bool


def find(root: pathlib.Path = _ROOT) -> list[Script]:
  """Reads all files of `launch`, below a tree's root, that can be run."""
  found = []
  for path in sorted((root / "launch").rglob("*.py")):
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts).removesuffix(".__main__")
    text = path.read_text()
    if _is_run(ast.parse(text)) and module not in _INTERNAL:
      found.append(_script(module, text))
  return found


def _is_run(tree: ast.Module) -> bool:
  """Whether a file does something where it is __main__."""
  return any(
      isinstance(node, ast.If)
      and ast.unparse(node.test) == "__name__ == '__main__'"
      for node in tree.body
  )


def _script(module: str, text: str) -> Script:
  has_workdir = "define_workdir(" in text or "study_run.define(" in text
  argv = _SMALL.get(module)
  if argv is None:
    argv = ("--model=model",) if '"model"' in text else ()
  return Script(module, argv, has_workdir)


class World(NamedTuple):
  """A folder with what scripts read; they run in it.

  Attributes:
    folder: With `model`, `text.txt`, `classes.npz`, `empty` and `runs/a`.
  """

  folder: pathlib.Path

  def argv(self, script: Script, workdir: str) -> list[str]:
    """The flags of a script's smallest work, in a folder of its own."""
    own = [f"--workdir={workdir}"] if script.has_workdir else []
    if script.module in _WITH_OUTPUT:
      own = [f"--out={workdir}{_WITH_OUTPUT[script.module]}"]
    return [*own, *script.argv]


def make_world(folder: pathlib.Path) -> World:
  """Makes a model, a text, classes and what one training left behind."""
  (folder / "text.txt").write_text(TEXT)
  (folder / "empty").mkdir()
  save_classes(folder / "classes.npz")
  save_model(folder / "model")
  return World(folder)


def add_run(world: World, zygote: attacks.Zygote) -> None:
  """Adds runs/a, which `launch.compare_lm` and `launch.export` read."""
  argv = [*_SMALL["launch.train_lm"], "--workdir=runs/a"]
  ended = zygote.attack(
      "launch.train_lm", *argv, cwd=world.folder, hooks=["undrawn"]
  )
  if ended.status:
    raise RuntimeError(ended.err)


def flags_of(
    script: Script, world: World, zygote: attacks.Zygote
) -> list[dict[str, Any]]:
  """The flags that a script has, as it says itself.

  Raises:
    ValueError: It names none, and is not one without flags.
  """
  if script.module in _WITHOUT_FLAGS:
    return []
  argv = world.argv(script, "unused")
  ended = zygote.attack(script.module, *argv, cwd=world.folder, hooks=["flags"])
  found = json.loads(ended.out)
  if not found:
    raise ValueError(f"{script.module} names no flags: {ended.err}")
  return found


def save_classes(path: pathlib.Path, seed: int = 0) -> None:
  """Writes P(l|n) of four classes over nine tokens, one of them its own."""
  probs = np.random.default_rng(seed).random((4, 9))
  probs[:, :4] = np.eye(4)
  probs /= probs.sum(1, keepdims=True)
  np.savez(path, probs=probs, query=np.arange(4) % 2, label=np.arange(4))


def save_model(folder: pathlib.Path) -> None:
  """Writes a model of random numbers that reads bytes."""
  folder.mkdir(exist_ok=True)
  model = models.Transformer(_MODEL, implementation="reference")
  params = model.init(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
  pretrained.save(folder, _MODEL, params)
  tokenizer.save(tokenizer.Bytes(), folder)
