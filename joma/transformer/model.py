"""A decoder-only Transformer in Linen, of every family of `config`.

  x = embed(tokens) + positions
  x = x + attention(norm(x)),  x = x + mlp(norm(x))      L times (pre-norm)
  logits = norm(x) W_output

Everything that the analyses look at is sown under "intermediates" by the
modules themselves: `model.apply(variables, tokens, mutable="intermediates")`.

Letters: B batch, T positions, D width, F hidden width, N heads, H head size,
V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from joma.transformer import attention
from joma.transformer import config as configs
from joma.transformer import mlp
from joma.transformer import norm
from joma.transformer import routing
from joma.transformer import sharding
from joma.transformer.layers import cross_entropy
from joma.transformer.layers import products
from joma.transformer.layers import scanning
from joma.transformer.rope import absolute
from kernels_pallas import implementations
from kernels_pallas import logits as logits_lib
from kernels_pallas import masks
from scansnap_jax.experiment import errors


class Transformer(nn.Module):
  """Tokens to logits.

  Sows `resid_embed` [B, T, D], the residual stream that the first layer reads.

  Attributes:
    config: The shape.
    dtype: Of the products and the residual stream; norms, softmax and logits
      are float32, and parameters are as they are stored.
    implementation: Of attention, see `kernels_pallas.implementations`.
    remat: What the backward pass computes anew instead of keeping it: none,
      full (each layer), dots (of each layer all but products with weights) or
      offload (as dots, and the products wait in the host's memory).
    mlp_piece: Positions that an MLP takes at a time, so that long texts need
      less memory; None is all.
    loss_piece: Positions whose logits are made at a time where `targets` are
      given, once more in the backward pass; None is all at once.
  """

  config: configs.TransformerConfig
  dtype: jax.typing.DTypeLike = jnp.float32
  implementation: implementations.Implementation | None = None
  remat: configs.Remat = "none"
  mlp_piece: int | None = None
  loss_piece: int | None = None

  @nn.compact
  def __call__(
      self,
      tokens: Int[Array, "B T"],
      *,
      positions: Int[Array | np.ndarray, "B T"] | None = None,
      mask: masks.Mask | None = None,
      kv_cache: tuple[Any, ...] | None = None,
      logits_at: Int[Array, "B"] | None = None,
      targets: Int[Array, "B T"] | None = None,
      is_training: bool = False,
      router: routing.Router | None = None,
  ) -> Any:
    """Returns logits [B, T, V], float32; with a cache, (logits, cache).

    Args:
      tokens: Each in [0, V).
      positions: Where the tokens stand; None is 0, 1, ... -1 marks padding.
      mask: Which tokens see which; None is causal. Not for use with a cache,
        which knows what it holds.
      kv_cache: A `hooks.KVCache` a layer.
      logits_at: Index in T of the one token of each sequence whose logits are
        wanted; the result is then [B, 1, V].
      targets: The right token behind each; the result is then each one's
        cross-entropy [B, T] in nats.
      is_training: Whether to drop; wants an rng "dropout" if config drops.
      router: Takes the place of products of heads and neurons.

    Raises:
      UserError: If there are more tokens than learned positions, or if the
        systems of `config.attention` do not go together.
    """
    seq_len = tokens.shape[1]
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(seq_len)[None], tokens.shape)
    # As caches keep them, whatever JAX_ENABLE_X64 makes of a whole number.
    positions = jnp.asarray(positions, jnp.int32)
    token_embed = nn.Embed(
        self.config.vocab_size,
        self.config.embed_proj_dim or self.config.embed_dim,
        dtype=self.dtype,
        name="token_embed",
    )
    x = self._embed(token_embed, tokens, positions, is_training)
    self.sow("intermediates", "resid_embed", x)
    caches = kv_cache or (None,) * self.config.num_layers
    x, caches = self._layers(x, positions, mask, caches, is_training, router)
    # Before the output layer, which for a whole prompt is the largest product.
    if logits_at is not None:
      x = jnp.take_along_axis(x, logits_at[:, None, None], axis=1)
    if targets is None:
      out = self._logits(token_embed.embedding, x)
    else:
      out = self._losses(token_embed.embedding, x, targets)
    return out if kv_cache is None else (out, caches)

  def _layers(
      self,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      mask: masks.Mask | None,
      caches: tuple[Any, ...],
      is_training: bool,
      router: routing.Router | None,
  ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """The residual stream after all layers, and their caches."""
    if self.config.scan_layers:
      if router is not None or any(cache is not None for cache in caches):
        raise errors.UserError(
            "scan_layers is for training: caches and routers want layers one by"
            " one, as scanning.unstack makes them."
        )
      return self._scanned(x, positions, mask, is_training), caches
    layer_class = self._layer_class()
    # What a layer of systems hands to later ones; plain layers need nothing.
    carry: Mapping[str, PyTree] = (
        {"resid_embed": x} if self.config.attention else {}
    )
    new_caches, x_before = [], None
    for layer, cache in enumerate(caches):
      x_in = x
      x, cache, carry = layer_class(
          self.config,
          layer,
          self.dtype,
          self.implementation,
          self.mlp_piece,
          name=f"layers_{layer}",
      )(x, positions, mask, cache, is_training, carry, router, x_before)
      new_caches.append(cache)
      # For a router alone: remat would keep it for every layer.
      x_before = x_in if router is not None else None
    return x, tuple(new_caches)

  def _layer_class(self) -> type["Layer"]:
    """Layer, or one of which the backward pass computes some anew."""
    if self.remat == "none":
      return Layer
    # Products with weights have no batch among their axes.
    policies = jax.checkpoint_policies
    keeps = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.offload_dot_with_no_batch_dims(
            "device", "pinned_host"
        ),
    }
    return nn.remat(
        Layer,
        # self is 0, is_training 5.
        static_argnums=(5,),
        policy=keeps[self.remat],
        # Within a loop nothing can be found to be the same as before it.
        prevent_cse=not self.config.scan_layers,
    )

  def _scanned(
      self,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      mask: masks.Mask | None,
      is_training: bool,
  ) -> Float[Array, "B T D"]:
    """The residual stream after all layers, one program that runs L times."""
    # Any number stands for all: `config` has seen to it that they are alike.
    layer = self._layer_class()(
        self.config,
        0,
        self.dtype,
        self.implementation,
        self.mlp_piece,
        name=scanning.STACKED,
    )

    def body(layer: Layer, x: Array, _: None) -> tuple[Array, None]:
      return layer(x, positions, mask, None, is_training)[0], None

    scan = nn.scan(
        body,
        variable_axes={"params": 0, "intermediates": 0, "losses": 0},
        split_rngs={"params": True, "dropout": True},
        length=self.config.num_layers,
    )
    return scan(layer, x, None)[0]

  def _embed(
      self,
      token_embed: nn.Embed,
      tokens: Int[Array, "B T"],
      positions: Int[Array, "B T"],
      is_training: bool,
  ) -> Float[Array, "B T D"]:
    config = self.config
    x = token_embed(tokens)
    x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.embed_proj_dim is not None:
      x = self._dense(config.embed_dim, "embed_proj")(x)
    if config.positions == "learned":
      absolute.check_learned_positions(config, tokens.shape[1])
      x = x + nn.Embed(
          config.max_len + config.position_offset,
          config.embed_dim,
          dtype=self.dtype,
          name="position_embed",
      )(jnp.maximum(positions, 0) + config.position_offset)
    elif config.positions == "sinusoidal":
      x = x + absolute.sinusoids(positions, config.embed_dim).astype(x.dtype)
    return nn.Dropout(config.dropout)(x, deterministic=not is_training)

  def _losses(
      self,
      table: Float[Array, "V _"],
      x: Float[Array, "B T D"],
      targets: Int[Array, "B T"],
  ) -> Float[Array, "B T"]:
    """Each token's cross-entropy, `loss_piece` positions at a time."""

    def one(
        model: "Transformer", _: None, piece: tuple[Array, Array]
    ) -> tuple[None, Array]:
      logits = sharding.kept_split(model._logits(table, piece[0]))
      return None, cross_entropy.token_losses(logits, piece[1])

    if self.loss_piece is None:
      return one(self, None, (x, targets))[1]

    over = nn.scan(
        nn.remat(one, prevent_cse=False),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    mesh = sharding.current_mesh()
    num_parts = 1 if mesh is None else mesh.shape["seq"]
    cut = lambda leaf: cross_entropy.into_pieces(
        leaf, self.loss_piece, num_parts
    )
    _, losses = over(self, None, (cut(x), cut(targets)))
    return cross_entropy.out_of_pieces(losses, targets.shape[1], num_parts)

  def _logits(self, table: Array, x: Array) -> Float[Array, "B T V"]:
    """Of what comes out of the layers; `table` is the embedding [V, D]."""
    config = self.config
    if config.use_final_norm:
      x = make_norm(config, self.dtype, "final_norm")(x)
    if config.embed_proj_dim is not None:
      x = self._dense(config.embed_proj_dim, "output_proj")(x)
    if config.tie_embeddings:
      logits = products.dot_general(
          x,
          table.astype(self.dtype).T,
          (((2,), (0,)), ((), ())),
          preferred_element_type=jnp.float32,
      )
    else:
      logits = self._dense(
          config.vocab_size, "output", use_bias=config.use_output_bias
      )(x).astype(jnp.float32)
    return logits_lib.soft_cap(logits, config.output_logits_soft_cap)

  def _dense(self, width: int, name: str, use_bias: bool = False) -> nn.Dense:
    return nn.Dense(
        width,
        use_bias=use_bias,
        dtype=self.dtype,
        name=name,
        dot_general=products.dot_general,
    )


class Layer(nn.Module):
  """Attention and MLP round the residual stream.

  Sows `resid_attn` and `resid_mlp` [B, T, D], the stream after each of the two.

  Attributes:
    config: The model's.
    layer: Which layer, from 0.
    dtype: As in `Transformer`.
    implementation: As in `Transformer`.
    mlp_piece: As in `Transformer`.
  """

  config: configs.TransformerConfig
  layer: int
  dtype: jax.typing.DTypeLike = jnp.float32
  implementation: implementations.Implementation | None = None
  mlp_piece: int | None = None

  @nn.compact
  def __call__(
      self,
      x: Float[Array, "B T D"],
      positions: Int[Array, "B T"],
      mask: masks.Mask | None = None,
      kv_cache: PyTree = None,
      is_training: bool = False,
      carry: Mapping[str, Any] | None = None,
      router: routing.Router | None = None,
      x_before: Float[Array, "B T D"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Any, Mapping[str, Any]]:
    """Returns the residual stream after this layer, its cache, and the carry.

    Args:
      x: The stream before it.
      positions: As in `Transformer`.
      mask: Likewise; made here where it is None, as what is computed anew in
        the backward pass knows nothing of its arguments while it is traced.
      kv_cache: The layer's.
      is_training: As in `Transformer`.
      carry: What earlier layers handed on.
      router: As in `Transformer`.
      x_before: What the layer before read, for the router.
    """
    config = self.config
    mask = masks.causal(x.shape[1]) if mask is None else mask
    attend = attention.Attention(
        config, self.layer, self.dtype, self.implementation, name="attn"
    )
    apply_mlp = mlp.Mlp(config, self.dtype, name="mlp")
    drop = nn.Dropout(config.dropout, deterministic=not is_training)
    before = config.norm_placement != "post"
    attn_in = self._norm("attn_norm", x) if before else x
    route = None
    if router is not None:
      x_before = x if x_before is None else x_before
      route = router.route(self.layer, x, x_before, positions, kv_cache)
    update, kv_cache, carry = attend(
        attn_in, positions, mask, kv_cache, is_training, carry, route
    )
    attn_resid = self._add(x, drop(update), "attn")
    self.sow("intermediates", "resid_attn", attn_resid)
    resid = x if config.use_parallel_residual else attn_resid
    mlp_in = self._norm("mlp_norm", resid) if before else resid
    if route is None and self.mlp_piece is not None:
      update = mlp.in_pieces(apply_mlp, mlp_in, self.mlp_piece)
    elif route is None:
      update = apply_mlp(mlp_in, is_training)
    else:
      update = route.mlp(apply_mlp, mlp_in, resid)
      kv_cache = route.new_cache(kv_cache)
    mlp_resid = self._add(attn_resid, drop(update), "mlp")
    self.sow("intermediates", "resid_mlp", mlp_resid)
    return mlp_resid, kv_cache, carry

  def _norm(self, name: str, x: Array) -> Array:
    return make_norm(self.config, self.dtype, name)(x)

  def _add(self, x: Array, update: Array, sublayer: str) -> Array:
    """Adds an update to the stream, normalized where the placement says so."""
    if self.config.norm_placement == "sandwich":
      return x + self._norm(f"{sublayer}_post_norm", update)
    if self.config.norm_placement == "post":
      return self._norm(f"{sublayer}_norm", x + update)
    return x + update


def make_norm(
    config: configs.TransformerConfig,
    dtype: jax.typing.DTypeLike,
    name: str | None,
) -> norm.Norm:
  """The norm of the model's residual stream."""
  return norm.Norm(
      config.norm,
      config.norm_epsilon,
      config.norm_scale_offset,
      dtype,
      name=name,
  )
