"""Faults in `joma.systems`: routers and mixers."""

TABLE = """
joma/systems/cache_policies/by_attention/kvzip.py
- is_counted = (rows >= starts[:, None]) & (rows < prompt.lengths[:, None])
+ is_counted = rows < prompt.lengths[:, None]
? the text's own queries count as well as its repetition's
@ test_what_the_repetition_looks_at_stays

joma/systems/cache_policies/by_attention/kvzap.py
- return jnp.exp(log_scores(Network(*(p[layer] for p in networks)), x))
+ return jnp.exp(log_scores(Network(*(p[0] for p in networks)), x))
? every layer is judged by the first one's network
@ test_layers_hand_on_what_attention_reads

joma/systems/profiles/kvzip_surrogate.py
- score, _, _ = calls.read_prompt(self.policy, whole)
+ score, _, _ = calls.read_prompt(self.policy, prompt)
? the text's own queries count as well as its repetition's
@ test_scores_are_the_greatest_weights_from_behind_the_text

joma/inference/cache/head_pool.py
- freed = ((slots.pos >= 0) & (pos < 0)).any(axis=1, keepdims=True)
+ freed = ((slots.pos >= 0) & (pos < 0)).all(axis=1, keepdims=True)
? pages keep what is below a threshold
@ tests/joma/systems/cache_policies/wrapping/dms_pages_test.py
@ test_steps_keep_what_slots_keep_and_pages_are_given_back

joma/inference/cache/calls.py
- return first if None not in others else None
+ return None
? a policy that wraps KVzip reads a text once
@ tests/joma/systems/cache_policies/by_attention/kvzip_test.py
@ test_what_wraps_it_asks_for_what_it_asks

joma/inference/cache/rehearsal.py
- positions=jnp.where(is_text, positions, -1),
+ positions=positions,
? tokens of the repetition stay
@ tests/joma/systems/cache_policies/by_attention/kvzip_test.py
@ test_what_the_repetition_looks_at_stays

joma/systems/cache_policies/by_attention/simlayerkv.py
- is_due = step.position + 1 >= 2 * self._num_lazy()
+ is_due = step.position + 1 >= self._num_lazy()
? texts without a long prompt are judged when nearly all of them is near
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/cache_policies/by_attention/simlayerkv.py
- is_recent = pos >= last - (self.num_recent or 0)
+ is_recent = pos > last - (self.num_recent or 0)
? the window is a token shorter where it is judged
@ test_keeps_what_plain_python_keeps_at_every_step

joma/inference/cache/slot_step.py
- old, cache = cache, without_freed(cache, position)
+ old, cache = cache, without_freed(cache, position - 1)
? slots are freed a step too late
@ tests/joma/systems/cache_policies/by_attention/simlayerkv_test.py
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/cache_policies/chunks.py
- chunk = jnp.where(pos < 0, -1, pos // size)[order]
+ chunk = (jnp.where(pos < 0, -1, pos) // size)[order] // 2
? chunks are twice as long
@ tests/joma/systems/cache_policies/by_attention/chunkkv_test.py
@ test_sums_of_chunks_by_hand

joma/systems/cache_policies/own_cache/think.py
- asked = jnp.where(is_first[:, None, None], self._squares(query), 0.0)
+ asked = jnp.zeros_like(self.squares)
? a first block that is filled step by step is cut by nothing
@ test_is_plain_python_at_every_step

joma/systems/cache_policies/own_cache/think.py
- channels = jnp.where(is_first, chosen, self.channels)
+ channels = chosen
? each block changes the channels of all that were cut before
@ test_is_plain_python_at_every_step

joma/systems/cache_policies/own_cache/blocks.py
- is_last = slots[None] // size >= positions // size
+ is_last = slots[None] >= positions // size
? nearly all is read from the last block
@ tests/joma/systems/cache_policies/own_cache/kivi_test.py
@ test_is_plain_python_at_every_step

joma/systems/cache_policies/own_cache/coded_slots.py
- least = jnp.where(jnp.isfinite(least), least, 0)
+ least = 0 * jnp.where(jnp.isfinite(least), least, 0)
? slots that are empty widen the range of their group
@ tests/joma/systems/cache_policies/own_cache/coded_slots_test.py
@ test_is_plain_python_at_every_step

joma/systems/cache_policies/own_cache/int4.py
- offset, scale = offset.astype(dtype), scale.astype(dtype)
+ pass
? codes go by scales that are not the ones kept
@ test_scales_of_bfloat16_are_made_up_for

joma/systems/cache_policies/wrapping/cam.py
- count = jnp.maximum(follows.sum(axis=-1), 1)
+ count = jnp.full(size, self.num_merged)
? at the end of the text a part of the value is lost
@ test_keeps_what_plain_python_keeps_at_every_step

joma/inference/cache/slot_step.py
- cache = handed_on(cache, leaving, (cache.pos >= 0) & ~freed, position)
+ cache = handed_on(cache, leaving, cache.pos >= 0, position)
? what leaves at a step is not known to leave
@ tests/joma/systems/cache_policies/wrapping/cam_test.py
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/cache_policies/wrapping/criticalkv.py
- return jnp.argsort(order) >= order.shape[-1] - count
+ return order >= order.shape[-1] - count
? which slots come last, not where each comes
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/cache_policies/wrapping/criticalkv.py
- second = (attention + self.epsilon) * self.own(slots)
+ second = attention + self.epsilon * self.own(slots)
? values count only where attention is none
@ test_by_hand

joma/systems/cache_policies/by_key/cur.py
- key, value = (self._share(x, slots.pos) for x in slots.aux)
+ key, value = (self._share(x, slots.pos + 1) for x in slots.aux)
? chunks begin a token early
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/cache_policies/by_key/qfilter.py
- signed = jnp.where(along[..., None] < 0, -main, main).mean(axis=2)
+ signed = main.mean(axis=2)
? the sign of the main direction is left to chance
@ test_keeps_what_plain_python_keeps_at_every_step

joma/systems/readouts/pooling.py
- return jnp.arange(num_tokens)[None] < lengths[:, None]
+ return jnp.arange(num_tokens)[None] <= lengths[:, None]
? the first token of padding is a token
@ test_is_that_of_the_tokens_alone

joma/systems/readouts/pooling.py
- states += self.param("layer_embed", draw, states.shape[1:])[None]
+ self.param("layer_embed", draw, states.shape[1:])
? states of layers do not say whose they are
@ test_is_that_of_the_equations

joma/transformer/checkpoints/embed.py
- found[rows] = vectors[: len(rows)]
+ found[first : first + len(rows)] = vectors[: len(rows)]
? vectors come in the order of their texts' lengths
@ test_lines_are_those_read_alone_in_their_order

joma/systems/routers/gated_attention.py
- gates = jax.nn.sigmoid(opening.astype(jnp.float32))
+ gates = 2 * jax.nn.sigmoid(opening.astype(jnp.float32))
? half-open gates let everything through
@ test_weights_of_zero_are_half_of_plain_attention

joma/systems/routers/gated_attention.py
- opening = jnp.einsum("BTD,DNH->BTNH", call.x, kernel)
+ opening = jnp.einsum("BTD,DNH->BTNH", call.x, kernel[..., :1])
? the outputs of a head share one gate
@ test_a_gate_is_a_sigmoid_of_the_input

joma/systems/score_rules/differential.py
- apart = one - share * two
+ apart = one + share * two
? heads of a pair are added
@ test_a_head_is_taken_from_the_first_of_its_pair

joma/systems/score_rules/differential_cache.py
- read = jnp.einsum("BiPGC,BjPCH->BiPGjH", weights, value)
+ read = jnp.einsum("BiPGC,BjPCH->BjPGiH", weights, value)
? the second head of a pair reads values that are not its pair's
@ tests/joma/systems/conformance_test.py
@ test_prompts_and_steps_equal_one_pass

joma/systems/routers/head_gates.py
- routed = _num(chosen, active) * kept / kept.sum(axis=-1, keepdims=True)
+ routed = kept / kept.sum(axis=-1, keepdims=True)
? heads of a mixture are not as loud as heads
@ tests/joma/systems/routers/moh_test.py
@ test_all_heads_and_a_router_of_zeros_are_multi_head_attention
@ test_gates_are_those_of_the_equation

joma/systems/routers/head_gates.py
- return probs.shape[-1] ** 2 * (mean(probs) * mean(chosen)).mean()
+ return probs.shape[-1] * (mean(probs) * mean(chosen)).mean()
? the loss of balance shrinks with the number of heads
@ tests/joma/systems/routers/moh_test.py
@ test_balance_is_k_where_routing_is_uniform

joma/systems/routers/moh_blocks.py
- jnp.moveaxis(gates, 2, 1) > 0, jnp.asarray(every.num_valid), 0
+ jnp.moveaxis(gates, 2, 1) >= 0, jnp.asarray(every.num_valid), 0
? heads that are not chosen are computed all the same
@ test_tiles_visited_are_those_of_active_heads

joma/systems/routers/moh_norms.py
- return jnp.square(query).sum(axis=-1)
+ return -jnp.square(query).sum(axis=-1)
? the smallest queries are chosen
@ test_the_greatest_queries_are_chosen

kernels_pallas/linear_attention/documents.py
- reads = fading(at - count[:, None]) * (own == document[:, None])[..., None]
+ reads = fading(at - count[:, None])
? a document reads the state of the one before it
@ test_packed_documents_are_those_alone

kernels_pallas/linear_attention/documents.py
- rest = left(lengths)[..., None, None] * state
+ rest = left(jnp.full_like(lengths, query.shape[1]))[..., None, None] * state
? the first state fades over padding
@ test_a_padded_row_is_the_row_alone

joma/systems/mixers/documents.py
- return ((first == since) & (stop == place + 1)) | (first >= stop)
+ return (first <= since) | (first >= stop)
? a mask that says more than documents is passed over
@ tests/joma/systems/mixers/lightning_test.py
@ test_what_it_cannot_follow_is_refused

joma/systems/mixers/documents.py
- return place - begun
+ return place + 0 * begun
? the first tokens of a document read the one before it
@ tests/joma/systems/mixers/delta_layer_test.py
@ test_packed_documents_are_those_alone

joma/systems/mixers/delta_state.py
- lengths=is_token.sum(axis=1),
+ lengths=jnp.full_like(is_token[:, 0], is_token.shape[1], jnp.int32),
? padding writes into the state
@ tests/joma/systems/mixers/delta_layer_test.py
@ test_padded_prompts_leave_the_states_of_each_alone

joma/systems/mixers/gdn.py
- log_decay = -size * jax.nn.softplus(of_heads("decay") + bias)
+ log_decay = -size * jax.nn.softplus(of_heads("decay"))
? decays have lost their bias
@ tests/joma/systems/mixers/delta_layer_test.py
@ test_one_pass_is_the_recurrence

joma/systems/mixers/kda.py
- return -size * jax.nn.softplus(found + bias), jax.nn.sigmoid(beta)
+ return -size * jax.nn.softplus(found + bias), jax.nn.softplus(beta)
? beta is not below 1
@ tests/joma/systems/mixers/delta_layer_test.py
@ test_one_pass_is_the_recurrence

joma/systems/mixers/convolutions/gated_conv.py
- made = convolved.convolve(near, params["far"], length, since, _STEP)
+ made = convolved.convolve(near, params["far"], length, since)
? the second convolution reads every token
@ test_it_reads_22_tokens_back_and_no_farther

joma/systems/mixers/convolutions/gated_conv.py
- return jax.nn.sigmoid(product("gate") + query) * (product("feature") + key)
+ return jax.nn.sigmoid(product("gate")) * (product("feature") + key)
? a token's own query opens no gate
@ test_one_pass_is_the_equation

joma/systems/mixers/convolutions/grid_conv.py
- return inside & (row >= 0) & (column >= 0) & (column < self.columns)
+ return inside & (row >= 0)
? the end of a row is a neighbour of the next one's start
@ test_one_pass_is_the_equation

joma/systems/mixers/convolutions/newest_values.py
- newest = convolved.last_inputs(both, lengths, system.num_behind)
+ newest = both[:, -system.num_behind :]
? of a padded prompt, padding is kept as its newest values
@ tests/joma/systems/mixers/convolutions/grid_conv_test.py
@ test_padding_is_not_among_the_newest

joma/systems/selectors/branches/nsa.py
- complete = (np.arange(length, dtype=np.int32)[None] + 1) // self.block
+ complete = np.arange(length, dtype=np.int32)[None] // self.block + 1
? a query reads what its own block will become
@ test_compressed_reads_complete_blocks

joma/systems/selectors/branches/choice.py
- return best_blocks.best(weights.sum(axis=3), own, k)
+ return best_blocks.best(-weights.sum(axis=3), own, k)
? blocks of least weight are read
@ tests/joma/systems/selectors/branches/nsa_test.py
@ test_selected_reads_the_blocks_of_most_weight

joma/systems/routers/flux_router.py
- first, second = 2 * jax.lax.stop_gradient(multipliers) - multipliers
+ first, second = multipliers
? the price of missing the target falls while it is missed
@ tests/joma/systems/routers/flux_test.py
@ test_a_target_is_reached_as_the_price_rises

joma/systems/routers/flux_router.py
- ends = jnp.concatenate([step + 0 * lengths, lengths - 1 - step], axis=1)
+ ends = jnp.concatenate([step, length - 1 - step], axis=1) + 0 * lengths
? the router reads padding
@ tests/joma/systems/routers/flux_test.py
@ test_the_pool_is_of_both_ends_and_of_no_padding

joma/studies/systems/subjects/routed_heads.py
- both = _entropy(by_set) + _entropy(by_class) - _entropy(joint.ravel())
+ both = _entropy(by_set) + _entropy(by_class)
? the information of sets that tell nothing is not 0
@ tests/joma/studies/systems/routing/moh_test.py
@ test_is_that_of_counts_by_hand

joma/studies/systems/subjects/routed_heads.py
- target = jnp.where(kind[..., None] == 0, choose(near), choose(far))
+ target = jnp.where(kind[..., None] == 0, choose(near), choose(near))
? both classes ask for the same heads
@ tests/joma/studies/systems/routing/moh_test.py
@ test_a_class_says_its_own_places

joma/studies/systems/subjects/closed_heads.py
- best = np.argsort(-costs, axis=1)[:, :count]
+ best = np.argsort(costs, axis=1)[:, :count]
? the worst heads are kept
@ tests/joma/studies/systems/routing/moh_test.py
@ test_the_best_heads_are_those_that_cost_most

joma/studies/systems/subjects/closed_heads.py
- is_it = (jnp.arange(len(kernel)) == head) & (number == layer)
+ is_it = jnp.arange(len(kernel)) == head
? a head is removed from every layer at once
@ tests/joma/studies/systems/routing/moh_test.py
@ test_a_removed_head_is_one_that_is_closed

joma/systems/routers/nats_ways.py
- faded = jnp.exp(arrays[3].sum(axis=1))[..., None, None] * state
+ faded = state
? the state does not fade over chunks that are kept
@ tests/joma/systems/routers/nats_test.py
@ test_the_state_fades_over_what_is_kept
@ test_one_pass_is_that_by_hand

joma/systems/routers/nats_ways.py
- is_before = (place[None] < place[:, None])[None, None]
+ is_before = (place[None] != place[:, None])[None, None]
? queries read kept chunks that come after them
@ tests/joma/systems/routers/nats_test.py
@ test_kept_chunks_are_dense_attention

joma/systems/routers/nats_ways.py
- taken = jnp.where(is_kept, 0.0, 1.0 + slope)
+ taken = jnp.where(is_kept, slope, 1.0 + slope)
? a way that was not chosen has a gradient
@ tests/joma/systems/routers/nats_test.py
@ test_what_was_not_chosen_has_no_gradient

joma/systems/routers/nats_cache.py
- state = jnp.where(of_heads, faded, self.inner)
+ state = self.inner
? a chunk that is kept is folded into the state too
@ tests/joma/systems/conformance_test.py
@ test_prompts_and_steps_equal_one_pass

joma/systems/routers/nats_cache.py
- return jnp.where(is_lost, jnp.nan, out)
+ return out
? a chunk without a slot is dropped silently
@ tests/joma/systems/routers/nats_test.py
@ test_a_chunk_without_a_slot_is_told
@ test_generation_ends_with_the_number

joma/inference/generate.py
- reason = f"Layer {layer}: {told}"
+ reason = f"Layer {layer} is full."
? the number of what did not fit is not told
@ tests/joma/systems/routers/nats_test.py
@ test_generation_ends_with_the_number

joma/studies/systems/subjects/two_prompts.py
- targets = jnp.roll(tokens, _BACK, axis=1)
+ targets = jnp.roll(tokens, _BACK - 1, axis=1)
? what a local text asks for is nearer than it says
@ tests/joma/studies/systems/routing/flux_test.py
@ test_local_answers_stand_four_places_before

joma/studies/systems/subjects/two_prompts.py
- said = jnp.concatenate([said, c], axis=1)
+ said = jnp.concatenate([said, b], axis=1)
? texts that help say b where c follows it
@ tests/joma/studies/systems/routing/flux_test.py
@ test_answers_are_one_link_away_or_two

joma/studies/systems/subjects/two_prompts.py
- return float((apart > 0).mean() + 0.5 * (apart == 0).mean())
+ return float((apart >= 0).mean())
? equal probabilities count as told apart
@ tests/joma/studies/systems/routing/flux_test.py
@ test_the_area_is_the_share_of_pairs_in_order

joma/studies/systems/routing/nats.py
- ours = prob[:, : is_needle.shape[1]]
+ ours = prob[:, -is_needle.shape[1] :]
? chunks that are asked stand for those of the text
@ tests/joma/studies/systems/routing/nats_test.py
@ test_is_told_of_chunks_before_what_is_asked

joma/studies/systems/routing/nats.py
- more = -(-(num_bytes - cache_bytes(model, 1)) // each)
+ more = (num_bytes - cache_bytes(model, 1)) // each
? a window has fewer bytes than the router
@ tests/joma/studies/systems/routing/nats_test.py
@ test_a_window_is_the_least_with_as_many_bytes

joma/studies/systems/routing/needle_chunks.py
- ends = both(take(key_of), take(value_of))
+ ends = both(take(key_of), value_of[:, again[0]])
? answers are in the order of the first text
@ tests/joma/studies/systems/routing/nats_test.py
@ test_pairs_stand_in_needle_chunks_and_are_asked

joma/systems/mixers/memory/titans.py
- return titans_memory.Rule(self.loss == "mean", self.gelu == "erf")
+ return titans_memory.Rule(self.loss == "sum", self.gelu == "erf")
? squares are averaged where they should be summed
@ tests/joma/systems/mixers/memory/titans_test.py
@ test_means_of_squares_are_their_sums_with_smaller_steps

joma/systems/mixers/memory/titans_memory.py
- pushes = jax.tree.map(lambda x: -wide(rate) * x, grads)
+ pushes = jax.tree.map(lambda x: wide(rate) * x, grads)
? the memory climbs away from what it should say
@ tests/joma/systems/mixers/memory/titans_test.py
@ test_is_the_two_recurrences_by_hand
@ test_alone_it_is_the_delta_rule

joma/systems/mixers/memory/titans_memory.py
- return one[0] * two[0], two[0] * one[1] + two[1]
+ return one[0] * two[0], one[0] * one[1] + two[1]
? earlier steps fade by their own rates
@ tests/joma/systems/mixers/memory/titans_test.py
@ test_is_the_two_recurrences_by_hand

joma/systems/mixers/memory/titans_memory.py
- rest = jnp.where(where, 1 - first(tokens.forget), 1.0)
+ rest = 1 - first(tokens.forget)
? padding makes the memory fade
@ tests/joma/systems/mixers/memory/titans_test.py
@ test_padding_changes_nothing

joma/systems/mixers/memory/titans_memory.py
- jax.checkpoint(one), state, (jnp.arange(num_chunks), runs)
+ one, state, (jnp.arange(num_chunks), runs)
? a gradient keeps the weights after every token
@ tests/joma/systems/mixers/memory/titans_test.py
@ test_a_gradient_keeps_the_states_of_chunks_alone

joma/systems/mixers/memory/titans_cache.py
- is_end = (self.length + 1) % system.chunk == 0
+ is_end = self.length % system.chunk == 0
? chunks of steps end one token late
@ tests/joma/systems/conformance_test.py
@ test_prompts_and_steps_equal_one_pass

joma/studies/systems/memory.py
- near = jnp.einsum("BPH,BQH->BPQ", found, values[:, :, 0])
+ near = jnp.einsum("BPH,BQH->BPQ", found, keys[:, :, 0])
? what is recalled is held against keys
@ test_a_linear_memory_without_more_is_the_delta_rule

joma/studies/systems/bridge/training.py
- twin -= is_free * ATTENTION_RATE * setting.rate * pull
+ twin += is_free * ATTENTION_RATE * setting.rate * pull
? the twin climbs the loss
@ test_free_matrices_follow_lemma_1

joma/studies/systems/bridge/contexts.py
- offsets = rng.integers(1, length + 1, size=(num, length))
+ offsets = rng.integers(0, length, size=(num, length))
? a resampled context holds queries
@ test_resampled_tokens_are_those_in_front_of_the_same_next_token

joma/studies/systems/bridge/predictors.py
- for half, decoder in zip(halves, decoders[::-1], strict=True)
+ for half, decoder in zip(halves, decoders, strict=True)
? samples meet the decoder that they made
@ test_halves_meet_each_others_decoder

joma/studies/theories/sink_need.py
- weights = weights / number[None, :, None]
+ weights = weights / number.max()
? ReLU's weights are of the last token's number for all
@ test_weights_of_relu_are_over_the_tokens_so_far

joma/studies/systems/bridge/bridge_checkpoint.py
- found.velocity[query[:, None], candidate[None]].mean(axis=0)
+ found.velocity[candidate[None], query[:, None]].mean(axis=0)
? keys ask queries
@ test_velocity_is_that_of_the_queries_that_ask

scansnap_jax/run.py
- return (losses * classes.class_probs).sum()
+ return losses.sum()
? the loss of a population is that of its classes together
@ tests/scansnap_jax/train_test.py
@ test_metric_rows_are_the_history

scansnap_jax/figures/shared_seeds.py
- "effective_cells": float(len(rates) ** 2 / squares),
+ "effective_cells": float(len(rates) / squares),
? few independent points, whatever hangs together
@ test_seeds_that_move_points_together_leave_fewer

joma/studies/systems/bridge/verdict.py
- return intervals.interval(here - before)
+ return intervals.interval(here - before[::-1])
? seeds are paired with other seeds
@ tests/joma/studies/systems/bridge/bridge_ladder_test.py
@ test_names_the_rung_with_the_largest_fall
"""
