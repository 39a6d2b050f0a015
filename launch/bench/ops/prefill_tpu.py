"""Static figures of a prompt that is read in part, the choice included.

A part of `launch.bench.kernels` for --target=tpu:CHIP. About a tenth of the
blocks that a causal mask touches is read; which, HiP finds (`selectors.hip`),
by a search that is XLA's: its estimate of its cycles. Attention to the blocks
is our kernel's schedule, to as many blocks as HiP reads: the first, the query
block's own, and others drawn at random. All of a head, of eight that choose in
one call. Nothing is measured.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, PyTree
import numpy as np

from joma.systems.selectors import hip
from joma.transformer import config as configs
from joma.transformer import hooks
from kernels_pallas import masks
from kernels_pallas import selection as selection_lib
from kernels_pallas.aot import chips
from kernels_pallas.aot import jobs as jobs_lib
from kernels_pallas.attention import api
from launch.bench import harness
from launch.bench.ops import compiled
from launch.bench.ops import programs

DENSITY = 0.1
# Heads that choose in one call: of many small operations each has its start.
NUM_HEADS = 8
# Queries and keys of a block, the same number, and of which queries of a block
# every so many-th is asked.
CHOICES = ((128, 1), (256, 1), (256, 8), (512, 1), (512, 8))
_COLUMNS: harness.Columns = {
    "block": ("block", str),
    "stride": ("asked: every", str),
    "keys": ("keys a query", "{:,}".format),
    "density": ("of causal blocks", "{:.1%}".format),
    "attention": ("attention bundles", "{:,}".format),
    "choice": ("choice cycles", "{:,.0f}".format),
    "ratio": ("dense over both", "{:.1f}".format),
    "alone": ("over attention alone", "{:.1f}".format),
}


def attention(length: int, block: int, num: int) -> programs.Program:
  """Our kernel over `num` blocks of each query block, one head."""
  where = selection(length, block, num)
  attend = lambda *arrays: api.attention(
      *arrays, where=where, implementation="pallas_tpu"
  ).out
  return attend, (programs.heads_last(length, 1),) * 3


def selection(length: int, block: int, num: int) -> selection_lib.Selection:
  """The first block, a query block's own, and others drawn at random."""
  count = length // block
  order = np.random.default_rng(0).random((count, count))
  own = np.arange(count)
  order[:, 0] = order[own, own] = -1
  order[own[None] > own[:, None]] = 2
  table = np.argsort(order, axis=-1)[None, None, :, :num].astype(np.int32)
  num_valid = np.minimum(own + 1, num).astype(np.int32)[None, None]
  mask = masks.causal(length)
  return selection_lib.Selection(table, num_valid, mask, block, block)


def choice(length: int, k: int, block: int, stride: int) -> programs.Program:
  """What HiP does before attention: blocks of each query block and head."""
  system = hip.Hip(k=k, block=block, stride=stride)

  def choose(query: Array, key: Array) -> PyTree:
    call = hooks.Call(
        config=configs.TransformerConfig(),
        layer=0,
        x=jnp.zeros((1, length, 1)),
        positions=jnp.arange(length)[None],
        rotate=lambda x, positions: x,
        options=hooks.AttentionOptions(scale=programs.HEAD_DIM**-0.5),
        params={},
        carry={},
        is_training=False,
        has_cache=False,
    )
    found = system.select({}, call, query, key, masks.causal(length))
    return found.block_table, found.num_valid

  return choose, (programs.heads_last(length, NUM_HEADS),) * 2


def num_searched(length: int, block: int) -> int:
  """Blocks of the search, so that a tenth of the causal ones is read in all."""
  causal = (length // block + 1) / 2
  # The first and a query block's own are read besides.
  return max(round(DENSITY * causal) - 2, 1)


def measure(
    chip: chips.Chip,
    length: int,
    choices: Sequence[tuple[int, int]] = CHOICES,
) -> list[harness.Row]:
  """A row a choice, with the bundles of dense attention.

  Args:
    chip: What for; of one core, as heads are not shared out here.
    length: T.
    choices: Sizes of blocks, and every which query is asked.

  Raises:
    JobFailed: If one does not compile.
    ToolchainMissing: If the compiler is not installed.
  """
  cases = [
      compiled.Case(
          kernel="dense", program=programs.forward, options={"length": length}
      )
  ]
  for block, stride in choices:
    num, both = num_searched(length, block), {"length": length, "block": block}
    options = both | {"k": num * block, "stride": stride}
    cases += [
        compiled.Case(
            kernel="attention",
            program=attention,
            options=both | {"num": num + 2},
        ),
        compiled.Case(kernel="choice", program=choice, options=options),
    ]
  found = []
  for case, row, report in compiled.tpu_rows(chip, cases, 1):
    if report is None:
      raise jobs_lib.JobFailed(f"{case.kernel}: {row['note']}")
    found.append(row.get("static_bundles", report.fusion_cycles))
  dense, rows = found[0], []
  for i, (block, stride) in enumerate(choices):
    read, cycles = found[1 + 2 * i : 3 + 2 * i]
    count, num = length // block, num_searched(length, block) + 2
    num_read = np.minimum(np.arange(count) + 1, num).sum()
    rows.append({
        "chip": chip.name,
        "length": length,
        "dense": dense,
        "block": block,
        "stride": stride,
        "keys": num * block,
        "density": float(num_read / (count * (count + 1) / 2)),
        "attention": read,
        "choice": cycles / NUM_HEADS,
        "ratio": dense / (read + cycles / NUM_HEADS),
        "alone": dense / read,
    })
  return rows


def report(chip: chips.Chip, length: int) -> list[harness.Row]:
  """Prints what `measure` finds; returns it."""
  rows = measure(chip, length)
  print(
      f"{chip.name}: a prompt of T={length:,}, {DENSITY:.0%} of its causal"
      f" blocks read, chosen by {hip.Hip.name}; dense causal attention takes"
      f" {rows[0]['dense']:,} bundles a head.\n"
  )
  print(harness.table(_COLUMNS, rows))
  return rows
