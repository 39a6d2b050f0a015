"""The shape of a decoder-only Transformer: one dataclass for every family.

GPT-2, OPT, GPT-NeoX, Llama, Mistral, Qwen and Gemma differ by values of these
fields, never by classes; `pretrained` reads them from Hugging Face folders. The
encoder whose attention entropies Scan & Snap (https://arxiv.org/abs/2305.16380)
and JoMA (https://arxiv.org/abs/2310.00535) measure is `authors_encoder`.

Letters: V vocabulary, L layers, D width, F hidden width of the MLP, N query
heads, K key and value heads, H size of a head, T positions.
"""

import dataclasses
from typing import Literal

from joma.systems import names
from joma.transformer.layers import projections
from joma.transformer.rope.config import RopeConfig
from kernels_pallas.activation_names import Activation
from scansnap_jax.experiment import require
from scansnap_jax.experiment.errors import UserError

# What the backward pass computes anew: nothing, whole layers, or all of them
# but the products with weights, which stay on the device or wait in the memory
# of its host.
Remat = Literal["none", "full", "dots", "offload"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Every hyperparameter of the model; the defaults are a small Llama.

  Attributes:
    vocab_size: Vocabulary size V; train_lm takes the tokenizer's where it is
      not given.
    num_layers: Number of layers L.
    embed_dim: Width D of the residual stream.
    num_heads: Number of query heads N.
    num_kv_heads: Number of key and value heads K; N is a multiple of it.
    head_dim: Head size H; N H need not be D.
    hidden_dim: Hidden width F of the MLP.
    max_len: Positions the model was made for; learned positions end there.
    norm: LayerNorm (mean and variance, with bias) or RMSNorm (scale alone).
    norm_placement: Place of the norms: before each sublayer (pre), after the
      residual sum (post), or before and after the sublayer, inside the residual
      (sandwich).
    norm_epsilon: Number added to the variance in norms.
    norm_scale_offset: Number added to the stored scales of norms: 1 where zeros
      are neutral.
    use_final_norm: Whether a norm comes before the output layer.
    positions: How the model knows the order of tokens.
    position_offset: First row of the learned table that is used.
    rope: Rotary frequencies.
    local_rope_theta: Base of the plain rotary frequencies in layers with a
      window; None is `rope` there too.
    rotary_fraction: Part of each head that is rotated, from its front.
    activation: Nonlinearity of the MLP.
    use_gated_mlp: Whether the MLP is act(x W_gate) * (x W_up), then W_down.
    use_qkv_bias: Whether query, key and value projections have a bias.
    use_attn_out_bias: Whether the attention's output projection has a bias.
    use_mlp_bias: Whether the MLP's projections have a bias.
    use_output_bias: Whether the output layer has a bias.
    tie_embeddings: Whether the output layer is the embedding, transposed.
    embed_proj_dim: Width of embeddings and output where it is not D.
    embed_scale: Factor of the token embeddings.
    use_parallel_residual: Whether attention and MLP read the same residual.
    windows: Keys that each layer's queries see, their own included, one number
      a layer and 0 for all; empty is all everywhere.
    attn_scale: Factor of the attention logits; None is H ** -0.5.
    attn_logits_soft_cap: c in c tanh(logits / c) of the attention logits; None
      is off.
    output_logits_soft_cap: c in c tanh(logits / c) of the output logits; None
      is off.
    use_qk_norm: Whether each head's query and key pass an RMSNorm.
    dropout: Fraction dropped from embeddings and sublayer outputs in training.
    attn_dropout: Fraction of attention weights dropped in training.
    hidden_dropout: Fraction of hidden activations dropped in training.
    residual_scale: Whether output projections start smaller by sqrt(2 L).
    attention: Systems in place of plain attention, parts joined by + as in
      ssa+hip:k=512; one entry for all layers, one a layer, or a pattern that
      repeats, softmax being plain; empty is plain everywhere.
    projection: What the matrices of attention and MLPs are: dense, or monarch,
      two block-diagonal factors, with options as in
      monarch:blocks=16:rank=1:part=mlp.
    scan_layers: Whether layers are one that runs in a loop, which is compiled
      once; for training, of models whose layers are alike.
  """

  vocab_size: int = 256
  num_layers: int = 4
  embed_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  hidden_dim: int = 512
  max_len: int = 1024
  norm: Literal["layer_norm", "rms_norm"] = "rms_norm"
  norm_placement: Literal["pre", "post", "sandwich"] = "pre"
  norm_epsilon: float = 1e-5
  norm_scale_offset: float = 0.0
  use_final_norm: bool = True
  positions: Literal["learned", "sinusoidal", "rotary", "none"] = "rotary"
  position_offset: int = 0
  rope: RopeConfig = RopeConfig()
  local_rope_theta: float | None = None
  rotary_fraction: float = 1.0
  activation: Activation = "silu"
  use_gated_mlp: bool = True
  use_qkv_bias: bool = False
  use_attn_out_bias: bool = False
  use_mlp_bias: bool = False
  use_output_bias: bool = False
  tie_embeddings: bool = True
  embed_proj_dim: int | None = None
  embed_scale: float = 1.0
  use_parallel_residual: bool = False
  windows: tuple[int, ...] = ()
  attn_scale: float | None = None
  attn_logits_soft_cap: float | None = None
  output_logits_soft_cap: float | None = None
  use_qk_norm: bool = False
  dropout: float = 0.0
  attn_dropout: float = 0.0
  hidden_dropout: float = 0.0
  residual_scale: bool = False
  attention: tuple[str, ...] = ()
  projection: str = projections.DENSE
  scan_layers: bool = False

  def __post_init__(self):
    for name in ("vocab_size", "num_layers", "embed_dim", "num_heads"):
      require.at_least(name, getattr(self, name), 1)
    for name in ("num_kv_heads", "head_dim", "hidden_dim", "max_len"):
      require.at_least(name, getattr(self, name), 1)
    # Far beyond what there is, yet not so far that it hangs.
    require.between("num_layers", self.num_layers, 1, 10**4)
    for name in ("vocab_size", "embed_dim", "num_heads", "head_dim"):
      require.between(name, getattr(self, name), 1, 2**31 - 1)
    require.between("hidden_dim", self.hidden_dim, 1, 2**31 - 1)
    require.positive("norm_epsilon", self.norm_epsilon)
    for name in ("dropout", "attn_dropout", "hidden_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise UserError(
            f"{name} must lie in [0, 1), got {getattr(self, name)}."
        )
    if self.num_heads % self.num_kv_heads:
      raise UserError(
          f"num_heads={self.num_heads} must be a multiple of"
          f" num_kv_heads={self.num_kv_heads}."
      )
    if len(self.windows) not in (0, self.num_layers):
      raise UserError(
          "windows must name one number a layer, or none: got"
          f" {len(self.windows)} for num_layers={self.num_layers}."
      )
    if any(window < 0 for window in self.windows):
      raise UserError(f"windows must not be negative, got {self.windows}.")
    names.check(self.attention, self.num_layers)
    self._check_alike()
    self._check_monarch()
    if self.use_parallel_residual and self.norm_placement != "pre":
      raise UserError(
          "use_parallel_residual wants norm_placement=pre, got"
          f" {self.norm_placement}."
      )
    if not 0 <= self.rotary_fraction <= 1:
      raise UserError(
          f"rotary_fraction must lie in [0, 1], got {self.rotary_fraction}."
      )
    if self.positions == "rotary" and self.rotary_dim % 2:
      raise UserError(
          f"rotary positions turn pairs: head_dim={self.head_dim} x"
          f" rotary_fraction={self.rotary_fraction} must be even, got"
          f" {self.rotary_dim}."
      )

  def _check_alike(self) -> None:
    """Raises UserError if layers of one program would differ."""
    if not self.scan_layers:
      return
    if len(set(self.windows)) > 1:
      raise UserError(
          "scan_layers makes one program of all layers, which would differ:"
          f" windows={','.join(map(str, self.windows))}."
      )
    if self.attention:
      raise UserError(
          "scan_layers makes one program of all layers, and"
          f" attention={','.join(self.attention)} may differ from layer to"
          " layer or hand on what layers have in common."
      )

  def _check_monarch(self) -> None:
    """Raises UserError unless all matrices can be cut into their blocks."""
    sizes = self.monarch
    if sizes is None:
      return
    if sizes.is_of("attn"):
      for name, heads in (
          ("query", self.num_heads),
          ("key", self.num_kv_heads),
      ):
        sizes.check(name, self.embed_dim, heads * self.head_dim)
    if sizes.is_of("mlp"):
      sizes.check("the MLP", self.embed_dim, self.hidden_dim)

  @property
  def monarch(self) -> projections.Monarch | None:
    """Sizes of Monarch matrices; None where all are dense."""
    return projections.parse(self.projection)

  @property
  def rotary_dim(self) -> int:
    """Numbers of each head that are rotated."""
    return int(self.head_dim * self.rotary_fraction)

  def rope_of(self, layer: int) -> RopeConfig:
    """Rotary frequencies of a layer."""
    if self.local_rope_theta is None or self.window_of(layer) is None:
      return self.rope
    return RopeConfig(rope_theta=self.local_rope_theta)

  def window_of(self, layer: int) -> int | None:
    """Keys that a layer's queries see; None where all are."""
    return (self.windows[layer] or None) if self.windows else None


def require_dense(config: TransformerConfig, who: str) -> None:
  """Raises UserError if what reads whole matrices meets Monarch ones.

  Args:
    config: The model's.
    who: Begins the sentence.
  """
  if config.monarch is not None:
    raise UserError(
        f"{who} reads dense matrices, and this model has"
        f" projection={config.projection}."
    )


def authors_encoder(
    vocab_size: int = 28_782, num_layers: int = 1, dropout: float = 0.2
) -> TransformerConfig:
  """The encoder of Scan & Snap's and JoMA's runs on WikiText.

  Post-LN, one head, ReLU, sinusoidal positions, embeddings times sqrt(D),
  biases everywhere, an untied output layer, no final norm: the language model
  of PyTorch's tutorial, with D = F = 200.

  Args:
    vocab_size: V; 28,782 for WikiText-2 by words, lower case.
    num_layers: L.
    dropout: Of embeddings, attention weights, hidden activations and sublayer
      outputs alike: .3 in Scan & Snap, .2 in JoMA.
  """
  return TransformerConfig(
      vocab_size=vocab_size,
      num_layers=num_layers,
      embed_dim=200,
      num_heads=1,
      num_kv_heads=1,
      head_dim=200,
      hidden_dim=200,
      max_len=5000,
      norm="layer_norm",
      norm_placement="post",
      use_final_norm=False,
      positions="sinusoidal",
      activation="relu",
      use_gated_mlp=False,
      use_qkv_bias=True,
      use_attn_out_bias=True,
      use_mlp_bias=True,
      use_output_bias=True,
      tie_embeddings=False,
      embed_scale=200**0.5,
      dropout=dropout,
      attn_dropout=dropout,
      hidden_dropout=dropout,
  )
