"""Faults in `kernels_pallas`."""

TABLE = """
kernels_pallas/masks.py
- stops = (spans.positions(num_queries, offset) + 1).clip(0, num_keys)
+ stops = spans.positions(num_queries, offset).clip(0, num_keys)
? a token does not see itself
@ test_equals_its_predicate

kernels_pallas/masks.py
- starts = positions - (reach - 1 if is_causal else reach)
+ starts = positions - reach
? a causal window is one token too long
@ test_equals_its_predicate

kernels_pallas/masks.py
- stops = spans.number("num_sinks", num_sinks, 0).clip(0, num_keys)
+ stops = spans.number("num_sinks", num_sinks, 0)
? there are more sinks than keys
@ test_there_are_no_more_sinks_than_keys

kernels_pallas/masks.py
- stops = xp.where(xp.asarray(segment_ids) < 0, starts, stops)
+ stops = xp.where(xp.asarray(segment_ids) < -1, starts, stops)
? padding attends to padding
@ test_negative_ids_are_padding

kernels_pallas/masks.py
- own = xp.arange(1, stops.shape[-1] + 1, dtype=xp.int32)
+ own = xp.arange(stops.shape[-1], dtype=xp.int32)
? a token of a document does not see itself
@ test_an_id_that_returns_is_another_document

kernels_pallas/masks.py
- key_ids=xp.where(is_token, 0, -1).astype(xp.int32),
+ key_ids=xp.zeros_like(ids, xp.int32),
? the last block reads the padding between demonstrations
@ test_a_negative_id_sees_nothing_and_is_seen_by_nothing

kernels_pallas/masks.py
- stop = xp.where(pieces < 0, start, xp.minimum(stop, group_stop))
+ stop = xp.minimum(stop, group_stop)
? padding reads the question of its group
@ test_a_negative_id_sees_nothing_and_is_seen_by_nothing

kernels_pallas/spans.py
- a1 = xp.where(touch, xp.maximum(a1, b1), a1)
+ a1 = xp.where(touch, b1, a1)
? a span within another cuts it short
@ tests/kernels_pallas/masks_test.py
@ test_equals_its_predicate

kernels_pallas/selection.py
- covers = covers & (first + block_kv <= num_keys)
+ covers = covers & (first <= num_keys)
? a block that runs over the end is read without its mask
@ test_a_ragged_last_tile_of_keys_is_never_full

kernels_pallas/selection.py
- touches, covers = touches & ~apart, covers & same
+ touches, covers = touches & ~apart, covers & ~apart
? a tile of mixed ids counts as full
@ test_a_tile_is_full_where_all_ids_are_one

kernels_pallas/selection.py
- heavy = (threshold_rank < num_heavy) & (candidates >= 0)
+ heavy = (threshold_rank <= num_heavy) & (candidates >= 0)
? one block more than asked is heavy
@ test_keeps_always_and_the_heaviest_of_the_rest

kernels_pallas/output.py
- col_mass = grouped.sum(axis=2)
+ col_mass = grouped.mean(axis=2)
? the mass of a KV head is a mean over its queries' heads
@ tests/kernels_pallas/attention/col_mass_test.py
@ test_is_the_value_cotangent_of_a_one_hot_channel

kernels_pallas/output.py
- safe = jnp.where(jnp.isneginf(highest), 0.0, highest)
+ safe = highest
? rows that no part sees become NaN
@ test_parts_without_keys_add_nothing

kernels_pallas/logits.py
- return logits if cap is None else cap * jnp.tanh(logits / cap)
+ return logits if cap is None else jnp.tanh(logits / cap)
? capped logits are lost in scale
@ test_a_cap_bounds_and_keeps_what_is_small

kernels_pallas/arguments.py
- if logits_soft_cap is not None and not logits_soft_cap > 0:
+ if logits_soft_cap is not None and not logits_soft_cap >= 0:
? a cap of 0 divides by it
@ test_arguments

kernels_pallas/arguments.py
- if shared == 0 or number == 0 or number % shared:
+ if shared == 0 or number == 0:
? query heads that no KV head serves are let in
@ test_arguments

kernels_pallas/linear_attention/cost.py
- states = 2 * 4 * heads * shape.head_dim**2
+ states = 4 * heads * shape.head_dim**2
? the state is read and not written
@ test_hand_count_of_the_backward

kernels_pallas/linear_attention/reference.py
- until = jnp.exp(log_decay[None, :] * (length - 1 - position[:, None]))
+ until = jnp.exp(log_decay[None, :] * (length - position[:, None]))
? the last token has decayed in the state
@ tests/kernels_pallas/linear_attention/api_test.py
@ test_equals_the_oracle

kernels_pallas/linear_attention/xla.py
- kept = jnp.exp(log_decay * length)[None, :, None, None] * state
+ kept = jnp.exp(log_decay * position.size)[None, :, None, None] * state
? decay runs over the padding of the last chunk
@ tests/kernels_pallas/linear_attention/api_test.py
@ test_any_decays_and_values

kernels_pallas/linear_attention/differentiable.py
- return by_out + by_state
+ return by_out
? decay has no gradient through the state
@ tests/kernels_pallas/linear_attention/api_test.py
@ test_equals_the_oracle

kernels_pallas/gated_delta_rule/operands.py
- return operands._replace(log_decay=jnp.where(starts, -jnp.inf, log_decay))
+ return operands._replace(log_decay=jnp.where(starts, -1.0, log_decay))
? a document sees a third of the one before it
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_documents_see_only_themselves

kernels_pallas/gated_delta_rule/operands.py
- counts = position[None] < lengths[:, None]
+ counts = position[None] <= lengths[:, None]
? the first token of padding is added to the state
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_padding_at_the_end_leaves_the_state

kernels_pallas/gated_delta_rule/reference.py
- recalled = ((decay * columns) * state).sum(axis=-2)
+ recalled = (columns * state).sum(axis=-2)
? what is recalled has not decayed
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_token_by_token_is_the_chunked_form

kernels_pallas/gated_delta_rule/algebra/chunk.py
- missing = value - fades.product(fades.before * key, state)
+ missing = value - fades.product(key, state)
? a chunk recalls its first state as if it had not decayed
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_documents_see_only_themselves

kernels_pallas/gated_delta_rule/algebra/chunk.py
- d_beta = d_right * (missing - product(same, added))
+ d_beta = d_right * missing
? the gradient of beta forgets what the chunk itself has added
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_equals_the_oracle

kernels_pallas/gated_delta_rule/algebra/chunk.py
- d_sums = query * d_query + key * (later - earlier)
+ d_sums = query * d_query + key * later
? decays have no gradient by what is read later
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_equals_the_oracle

kernels_pallas/gated_delta_rule/algebra/fading.py
- taken.append(is_own & (is_until == is_later))
+ taken.append(is_own & is_until & is_later)
? a key's channels do not decay on the way to the border of its block
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_equal_channels_are_one_decay

kernels_pallas/gated_delta_rule/algebra/inverse.py
- part = product.fine(product.fine(found, part), found)
+ part = product.fine(found, part)
? what a block adds does not reach the blocks after the next
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_token_by_token_is_the_chunked_form

kernels_pallas/gated_delta_rule/differentiable.py
- key=_sum_groups(found.key, operands.key),
+ key=_sum_groups(0.5 * found.key, operands.key),
? the gradient of a key is halved
@ tests/kernels_pallas/gated_delta_rule/api_test.py
@ test_equals_the_oracle

kernels_pallas/gated_delta_rule/cost.py
- + 2 * max(num_bits - 1, 0) * square * chunk
+ + max(num_bits - 1, 0) * square * chunk
? a round of the inverse has one product
@ test_products_of_a_chunk

kernels_pallas/gather_mlp/parts.py
- chosen = jnp.zeros((batch, num_blocks), bool).at[row, ids].max(is_valid)
+ chosen = jnp.zeros((batch, num_blocks), bool).at[row, ids].set(is_valid)
? padding of a list takes a chosen block away
@ tests/kernels_pallas/gather_mlp/api_test.py
@ test_any_blocks_and_values

kernels_pallas/gather_mlp/reference.py
- return activations.ACTIVATIONS[activation](gate) * hidden
+ return activations.ACTIVATIONS[activation](hidden) * gate
? the gate and what it gates are swapped
@ tests/kernels_pallas/gather_mlp/api_test.py::GatherMlpTest
@ test_equals_the_oracle

kernels_pallas/gather_mlp/selection.py
- return _list(scores, scores > threshold, max_blocks)
+ return _list(scores, scores >= threshold, max_blocks)
? a score at the threshold is above it
@ test_of_none_above

kernels_pallas/gather_mlp/cost.py
- products = 3 * weights - work.num_chosen * work.width
+ products = 2 * weights
? the backward pass does not make the hidden values anew
@ test_hand_count_of_a_gated_backward

kernels_pallas/gather_mlp/xla.py
- total, slab, index * spec.block_size, axis=0
+ total, slab, index, axis=0
? gradients land on the wrong neurons
@ tests/kernels_pallas/gather_mlp/api_test.py
@ test_any_blocks_and_values

kernels_pallas/hardware/gpu_math.py
- return weights * (1 - tanh * tanh)
+ return weights * (1 - tanh)
? the slope of a soft cap is wrong
@ test_gradient_of_a_tile

kernels_pallas/hardware/tpu_tile.py
- is_inside &= position >= starts[p : p + 1] - first_key
+ is_inside &= position > starts[p : p + 1] - first_key
? the first key of a span is not read
@ test_a_key_is_read_from_start_to_before_stop

kernels_pallas/attention/cost.py
- flops=10 * shape.head_dim * pairs * shape.num_heads,
+ flops=8 * shape.head_dim * pairs * shape.num_heads,
? the backward pass has five products
@ test_hand_count

kernels_pallas/attention/cost.py
- lengths = (where.stops - where.starts).clip(min=0)
+ lengths = where.stops - where.starts
? an empty span takes pairs away
@ test_a_span_that_is_empty_has_no_pairs

kernels_pallas/decode/cost.py
- row = stored * shape.head_dim + (4 if stored == 1 else 0)
+ row = stored * shape.head_dim
? scales of int8 rows are not read
@ test_hand_count_of_int8

kernels_pallas/decode/slots.py
- scale = jnp.abs(x).max(axis=-1) * (1 / 127)
+ scale = jnp.abs(x).max(axis=-1) * (1 / 128)
? the largest number of a row is clipped
@ test_is_off_by_half_a_step_at_most

kernels_pallas/decode/rule.py
- return (pos < rule.num_sinks) | (pos >= position - rule.num_recent)
+ return (pos < rule.num_sinks) | (pos > position - rule.num_recent)
? one recent token less is protected
@ tests/kernels_pallas/decode/api_test.py
@ test_protected_tokens_stay

kernels_pallas/decode/rule.py
- is_seen &= pos > position - rule.window
+ is_seen &= pos >= position - rule.window
? a window sees one token more
@ tests/kernels_pallas/decode/api_test.py
@ test_rules_of_policies_equal_the_oracle

kernels_pallas/attention/ring/order.py
- mirrored = 2 * num_devices - 1 - device
+ mirrored = num_devices + device
? devices meet different amounts of work
@ test_every_half_has_one_place_and_its_mirror_beside_it

kernels_pallas/attention/ring/passes.py
- return d_query, *ring.permute(tuple(sums), 1 - ring.num_steps)
+ return d_query, *ring.permute(tuple(sums), 1)
? gradients of keys that go part of the way round come home to another device
@ tests/kernels_pallas/attention/ring/api_test.py
@ test_values_gradients_and_column_sums_are_those_of_one_device

kernels_pallas/attention/ring/passes.py
- return starts.clip(0, size), stops.clip(0, size)
+ return starts.clip(0), stops.clip(0)
? keys of the second half are seen through the first one's spans
@ tests/kernels_pallas/attention/ring/api_test.py
@ test_a_ragged_causal_text_is_that_of_one_device

kernels_pallas/attention/array_masks.py
- return mask, xp.asarray((count <= 2).all())
+ return mask, xp.asarray((count <= 3).all())
? of three spans of a mask the middle one is lost
@ tests/kernels_pallas/attention/drop_in_test.py
@ test_spans_are_those_of_the_row

kernels_pallas/attention/array_masks.py
- is_row = jnp.arange(num_queries + extra).reshape(-1, size) < num_queries
+ is_row = jnp.arange(num_queries + extra).reshape(-1, size) >= 0
? queries that fill the last piece add to what keys got
@ tests/kernels_pallas/attention/drop_in_test.py
@ test_many_pieces_are_one

kernels_pallas/attention/drop_in.py
- num_queries, num_keys, window=left + right + 1, offset=right
+ num_queries, num_keys, window=left + right, offset=right
? a window leaves out its furthest key on the left
@ tests/kernels_pallas/attention/drop_in_test.py
@ test_values_and_residuals_are_those_of_jax

kernels_pallas/attention/xla/together.py
-   return read.repeat(block_q, axis=0) > 0
+   return jnp.tile(read, (block_q, 1)) > 0
? queries of a strip read the tiles of their neighbours' blocks
@ test_queries_of_a_block_read_the_tiles_of_their_own

kernels_pallas/attention/xla/together.py
-   return min(max(num_rows // (group * where.block_q), 1), num_blocks_q)
+   return min(max(num_rows // where.block_q, 1), num_blocks_q)
? a strip has the rows of all heads of its group
@ test_as_many_blocks_as_pay
"""
