"""What top-k and top-p add to the draw of a token.

  python -m launch.bench.sampling

prints milliseconds a draw, the least of several, and the ratio to a draw from
all tokens. Over 49,152 tokens, the vocabulary of SmolLM2, both together cost
1.8 times as much as neither (two busy CPU cores); 3 times is the bound.
"""

import functools
import time

from absl import flags
import jax
import jax.numpy as jnp

from joma.inference import sampling
from joma.inference import sampling_config
from launch.bench import harness
from launch.command import app
from scansnap_jax.experiment import require
from scansnap_jax.experiment.processes import devices

_MOST = 2**31 - 1
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 49152, "Tokens of the vocabulary.", 2, _MOST
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 1, "Sequences of a batch.", 1, _MOST
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 50, "Draws, of which the least.", 1, _MOST
)

_Config = functools.partial(sampling_config.SamplingConfig, temperature=1.0)
CASES = {
    "all": _Config(),
    "top_k=50": _Config(top_k=50),
    "top_p=0.9": _Config(top_p=0.9),
    "top_k=50 top_p=0.9": _Config(top_k=50, top_p=0.9),
}


def measure(vocab_size: int, batch_size: int, repeats: int) -> dict[str, float]:
  """Returns milliseconds a draw of each case."""
  shape = (batch_size, vocab_size)
  logits = 3 * jax.random.normal(jax.random.key(0), shape)
  draws = {
      name: jax.jit(functools.partial(sampling.sample, config=config))
      for name, config in CASES.items()
  }
  found = {name: float("inf") for name in CASES}
  for repeat in range(repeats + 1):
    # In turns, so that a busy machine is as busy for all.
    for name, draw in draws.items():
      started = time.perf_counter()
      jax.block_until_ready(draw(logits, step=jnp.int32(repeat)))
      ms = 1e3 * (time.perf_counter() - started)
      found[name] = min(found[name], ms) if repeat else found[name]
  return found


def main(_: list[str]) -> None:
  """Prints a line a case."""
  harness.check_compiles()
  devices.set_up(num_cpu_devices=1)  # Whose computations take all cores.
  # Logits, their draws, and what a sort makes of them.
  require.memory(
      f"--batch_size={_BATCH_SIZE.value} of --vocab_size={_VOCAB_SIZE.value}",
      16 * _BATCH_SIZE.value * _VOCAB_SIZE.value,
  )
  found = measure(_VOCAB_SIZE.value, _BATCH_SIZE.value, _REPEATS.value)
  for name, ms in found.items():
    print(f"{name:20s} {ms:8.3f} ms {ms / found['all']:6.2f}x")


if __name__ == "__main__":
  app.run(main, keeps_compiled=False)
