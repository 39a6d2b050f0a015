"""What each script is started with: all of its work, at its smallest.

Scripts that read a model or a run read what `train_lm` and `export` leave in
the same folder.
"""

from collections.abc import Sequence

from scansnap_jax.experiment import errors

TEXT = "text.txt"
LINES = "to be or not to be, that is the question\n" * 40
_SMOKE = ("--preset=smoke", "--workdir={own}")
_MODEL, _READ = "--model=model", f"--text={TEXT}"
_OF = {
    "train_lm": (*_SMOKE, f"--corpus={TEXT}"),
    "export": ("--workdir=run", "--out={own}"),
    "generate": (_MODEL, "--prompt=to be", "--max_new_tokens=16"),
    "inspect_lm": (_MODEL, _READ, "--window=32", "--workdir={own}"),
    "explore": (
        *(_MODEL, "--prompt=to be or not", "--policies=h2o,snapkv"),
        "--out={own}.html",
    ),
    "embed": (_MODEL, _READ, "--out={own}.npz"),
    "compare_lm": ("--runs=run", "--workdir={own}"),
    "scansnap": _SMOKE,
    "joma": _SMOKE,
    "attention": ("--study=dilution", *_SMOKE),
    "evaluate_cache": _SMOKE,
    "bridge": (*_SMOKE, f"--lm.corpus={TEXT}"),
    "contextual_sparsity": _SMOKE,
    "rope_extension": (*_SMOKE, f"--corpus={TEXT}"),
    "cost_table": ("--lengths=512", "--batch_sizes=1"),
    "plan": (
        *("--topology=v5e:2x2", "--shape=model", "--task=decode"),
        *("--batch=4", "--seq_len=16", "--mesh=4,1,1", "--workdir={own}"),
    ),
}
NAMES = tuple(_OF)
# What others read: the names of the folders that they read it from.
LEFT = {"train_lm": "run", "export": "model"}


def arguments(name: str, own: str) -> list[str]:
  """Returns the flags of a script.

  Args:
    name: What follows `python -m launch.`.
    own: What the start may write, relative to where it is started.
  """
  return [part.format(own=own) for part in _OF[name]]


def check(names: Sequence[str]) -> None:
  """Raises UserError where a name is none of the scripts."""
  for name in names:
    if name not in _OF:
      raise errors.UserError(f"scripts={name} is none of {', '.join(NAMES)}.")
