"""Faults in `joma.inference`: sampling, evaluation, costs, bridge, sparsity."""

TABLE = """
joma/inference/sparsity/gated/methods.py
- return Update(out, inputs * weights.matrix)
+ return Update(out, _share(h_kept) * weights.matrix)
? what inputs of up and gate read is not counted
@ tests/joma/inference/sparsity/gated/methods_test.py
@ test_teal_reads_the_rows_of_large_inputs

joma/inference/sparsity/gated/allocation.py
- if hull and costs[option] >= costs[hull[-1]]:
+ if hull and costs[option] > costs[hull[-1]]:
? a layer may read more for nothing
@ tests/joma/inference/sparsity/gated/allocation_test.py
@ test_an_option_that_reads_more_for_nothing_is_never_chosen

joma/inference/evaluation/protocols/scopes.py
- num_heads = sum(cache.pos.shape[1] for cache in caches)
+ num_heads = caches[0].pos.shape[1]
? a model keeps what one of its layers would
@ tests/joma/inference/evaluation/protocols/scopes_test.py
@ test_the_best_of_all_heads_stay_as_many_as_a_head_has_on_average

joma/inference/evaluation/protocols/scopes.py
- start += ranks.shape[1]
+ start += 0
? every layer keeps what the first one should
@ tests/joma/inference/evaluation/protocols/scopes_test.py
@ test_the_best_of_all_heads_stay_as_many_as_a_head_has_on_average

joma/inference/cost/traced.py
- moved, more = _moved_of(jaxpr, tuple(kept))
+ jaxpr = made; moved, more = _moved_of(jaxpr, tuple(kept))
? products that no result needs are counted
@ tests/joma/inference/cost/system_costs_test.py
@ test_what_no_result_needs_counts_nothing

joma/inference/cache/host_pages.py
- _, total, out = jax.lax.fori_loop(0, index, add_page, sums)
+ _, total, out = jax.lax.fori_loop(0, index + 1, add_page, sums)
? the page that is being filled counts twice
@ test_a_step_is_softmax_over_all_before_it

joma/inference/cache/host_pages.py
- total * shrink + weights.sum(axis=-1),
+ total + weights.sum(axis=-1),
? a page of greater logits leaves the sums before it too large
@ test_a_step_is_softmax_over_all_before_it

joma/inference/decode_steps.py
- tokens = jnp.where(state.is_done, state.tokens, tokens)
+ tokens = jnp.where(state.is_done, tokens, state.tokens)
? sequences that are not done repeat their token
@ tests/joma/inference/generate_test.py
@ test_a_sequence_ends_at_its_end_of_text

joma/inference/decode_steps.py
- is_done=state.is_done | is_eos(tokens, eos_ids),
+ is_done=state.is_done,
? a stop token stops nothing
@ tests/joma/inference/generate_test.py
@ test_a_sequence_ends_at_its_end_of_text

joma/inference/decode_steps.py
- tokens = sampling.sample(logits[:, 0], sampler, state.num_new)
+ tokens = sampling.sample(logits[:, 0], sampler)
? every token is drawn with the same key
@ tests/joma/inference/generate_test.py
@ test_each_token_is_drawn_with_a_key_of_its_own

joma/inference/decode_steps.py
- steps = jnp.arange(prompts.shape[1])[None]
-   positions = jnp.where(steps < lengths[:, None], starts[:, None] + steps, -1)
+ steps = jnp.arange(prompts.shape[1])[None]
+   is_read = steps <= lengths[:, None]
+   positions = jnp.where(is_read, starts[:, None] + steps, -1)
? one padding token of a prompt is read
@ tests/joma/inference/generate_test.py
@ test_padding_of_a_prompt_is_not_kept

joma/inference/sampling.py
- jnp.where(order >= higher, weights, 0)
+ jnp.where(order > higher, weights, 0)
? of equal tokens none counts, and one token too many is kept
@ test_numbers_beside_each_other_are_told_apart

joma/inference/sampling.py
- logits = keep_top(logits / config.temperature, config)
+ logits = keep_top(logits, config)
? the temperature has no effect
@ test_draws_have_the_probabilities

joma/inference/sampling.py
- return jnp.where(order < least, -jnp.inf, logits)
+ return jnp.where(order <= least, -jnp.inf, logits)
? one token less than top_k is kept
@ test_draws_have_the_probabilities

joma/inference/stop_tokens.py
- for name in ("generation_config.json", "config.json"):
+ for name in ("config.json", "generation_config.json"):
? the model's stop token goes before that of its chats
@ test_generation_config_goes_first

joma/inference/evaluation/evaluate.py
- loss = jnp.where(time + 1 < lengths, loss, 0.0)
+ loss = jnp.where(time < lengths, loss, 0.0)
? the loss at the last token, which predicts none, counts
@ test_token_by_token_is_what_reading_at_once_gives

joma/inference/evaluation/evaluate.py
- share = kept / jnp.maximum(number, 1)
+ share = kept / jnp.maximum(number, 2)
? recall of one gold token is half of it
@ test_a_window_has_the_last_tokens

joma/inference/evaluation/evaluate.py
- is_kept = (pos[..., None] == gold[:, None, None]).any(axis=2)
+ is_kept = (pos[..., None] >= gold[:, None, None]).any(axis=2)
? a token counts as kept when a later one is
@ test_a_window_has_the_last_tokens

joma/inference/evaluation/evaluate.py
- found[row, start:] = values[row, : length - start]
+ found[row, : length - start] = values[row, : length - start]
? what is seen after a context is noted at its start
@ test_a_context_is_compressed_before_it_is_asked

joma/inference/evaluation/evaluate_grid.py
- key: np.stack([part.mean(axis=0) for part in np.split(x, num_draws)])
+ key: x
? texts of one draw count as draws of their own
@ test_texts_of_one_draw_of_a_policy_are_one_draw

joma/inference/evaluation/evaluate_grid.py
- row["recall_by_layer"] = by_layer.mean(axis=0).tolist()
+ row["recall_by_layer"] = by_layer.mean(axis=1).tolist()
? recall by layer is recall by text
@ test_rows_of_a_task

joma/inference/evaluation/tasks.py
- targets[row, query.position] = query.answer[0]
+ targets[row, query.position] = query.answer[-1]
? the last token of an answer is asked for first
@ test_an_answer_of_several_tokens_begins_with_its_first

joma/inference/evaluation/tasks_needles.py
- first = round(place * rounds)
+ first = round((1 - place) * rounds)
? the depth of a needle counts from the end
@ tests/joma/inference/evaluation/tasks_test.py
@ test_a_pass_key_lies_where_it_is_told_to

joma/inference/evaluation/tasks_needles.py
- number if is_asked else "",
+ number,
? numbers that nobody asks for are gold
@ tests/joma/inference/evaluation/tasks_test.py
@ test_gold_of_needles_are_the_numbers_asked

joma/inference/evaluation/ruler/needles.py
- return other() if key in keys else _needle(task, key, value)
+ return _needle(task, keys[0], value)
? needles that nobody asks for have the key that is asked
@ tests/joma/inference/evaluation/ruler/needles_test.py
@ test_what_is_asked_is_what_needles_say

joma/inference/evaluation/ruler/hay.py
- places = np.full(len(needles), round(depth * len(pieces)))
+ places = np.full(len(needles), round((1 - depth) * len(pieces)))
? the depth of a needle counts from the end
@ tests/joma/inference/evaluation/ruler/needles_test.py
@ test_a_depth_is_a_share_of_the_hay

joma/inference/evaluation/ruler/word_counts.py
- asked = words[1 : num_asked + 1]
+ asked = words[:num_asked]
? the dots count as a word
@ tests/joma/inference/evaluation/ruler/others_test.py
@ test_frequencies_follow_a_zeta_law

joma/inference/evaluation/ruler/tracking.py
- turns = generator.permutation(np.repeat(np.arange(num_chains), per_chain))
+ turns = np.repeat(np.arange(num_chains), per_chain)[::-1] * 0
? every statement is of the first chain
@ tests/joma/inference/evaluation/ruler/others_test.py
@ test_variables_are_those_that_get_the_value

joma/inference/evaluation/ruler/questions.py
- return _ask(generator, texts, question, rivers[0])
+ return _ask(generator, texts, question, rivers[-1])
? another town's river is the answer
@ tests/joma/inference/evaluation/ruler/others_test.py
@ test_two_passages_hold_the_answer_together

joma/inference/evaluation/ruler/scoring.py
- found = [answer.lower() in said for answer in answers]
+ found = [answer in said for answer in answers]
? capital letters are lost
@ tests/joma/inference/evaluation/ruler/ruler_tasks_test.py
@ test_shares_of_what_was_said

joma/inference/evaluation/protocols/reading.py
- is_kept = order[..., ::-1] < sizes[:, None, None]
+ is_kept = order[..., ::-1] <= sizes[:, None, None]
? a shorter text keeps one token too many
@ tests/joma/inference/evaluation/protocols/reading_test.py
@ test_the_greatest_stay_and_of_equal_ones_the_newest

joma/inference/evaluation/protocols/reading.py
- said = jnp.where(is_answer & ~is_end, place, size)
+ said = jnp.where(is_answer, place, size)
? the token that ends an answer is part of it
@ tests/joma/inference/evaluation/protocols/reading_test.py
@ test_an_answer_ends_before_the_token_that_ends_it

joma/inference/evaluation/protocols/leaderboard.py
- counted = [by_task[task] for task in passed]
+ counted = [*by_task.values()]
? the mean has tasks that the full cache fails
@ tests/joma/inference/evaluation/protocols/ruler_grid_test.py
@ test_means_leave_out_what_full_fails

scansnap_jax/experiment/json_file.py
- file.write("\\n" * is_cut + json.dumps(value) + "\\n")
+ file.write(json.dumps(value) + "\\n")
? a row after one that was cut short is lost with it
@ tests/joma/inference/evaluation/protocols/ruler_grid_test.py
@ test_a_run_that_was_cut_goes_on_from_its_rows

joma/inference/harness/requests.py
- span = slice(length - count - 1, length - 1)
+ span = slice(length - count, length)
? a continuation is scored by the losses of the tokens after its own
@ tests/joma/inference/harness/requests_test.py
@ test_scores_are_those_of_single_tokens

joma/inference/harness/requests.py
- text = text.split(stop)[0] if stop else text
+ text = text.partition(stop)[0] + stop if stop in text else text
? the string that ends a text is part of it
@ tests/joma/inference/harness/requests_test.py
@ test_texts_end_before_a_string

joma/inference/cost/cost_model.py
- return kept if self.is_shared else 1 - (1 - kept) ** batch_size
+ return kept
? a batch of sequences reads no more than one
@ test_contextual_sparsity_reads_what_it_keeps_and_the_predictors

joma/inference/cost/cost_model.py
- min(slot, config.window_of(layer) or slot)
+ slot
? layers with windows read everything
@ test_windows_of_layers_are_read_and_no_more

joma/inference/cost/cost_model.py
- scale = _SCALE_BYTES if load.cache_dtype == "int8" else 0
+ scale = 0
? scales of int8 vectors take no room
@ test_int8_stores_a_scale_with_each_vector

joma/inference/cost/cost_model.py
- return "memory" if moving >= computing else "arithmetic"
+ return "memory" if moving <= computing else "arithmetic"
? the bound is the other one
@ test_the_bound_is_what_takes_longer

joma/inference/cost/cache_plan.py
- num_full = math.ceil(full_fraction * heads)
+ num_full = math.floor(full_fraction * heads)
? fewer heads than asked keep everything
@ tests/joma/inference/cost/cost_model_test.py
@ test_split_heads

joma/inference/cost/cache_plan.py
- tuple(min(slot, most) for slot in row)
+ tuple(most for slot in row)
? a step reads slots that are not there
@ tests/joma/inference/cost/cost_model_test.py
@ test_no_more_is_read_than_is_there

joma/inference/cost/chips.py
- return max(num_bytes / self.bytes_per_sec, flops / self.flops_per_sec)
+ return num_bytes / self.bytes_per_sec + flops / self.flops_per_sec
? bytes and products do not overlap
@ test_the_slower_of_memory_and_arithmetic_counts

joma/inference/cost/model_size.py
- num_norms = config.num_layers * (4 if sandwich else 2)
+ num_norms = config.num_layers * 2
? Gemma's norms after each part are not counted
@ test_total_is_that_of_an_initialization

joma/inference/cost/model_size.py
- rows = config.max_len + config.position_offset
+ rows = config.max_len
? OPT's two rows before the first position are not counted
@ test_total_is_that_of_an_initialization

joma/inference/cost/cost_table.py
- "speed_up": base["ms"] / ms if base and base["fits"] else None,
+ "speed_up": ms / base["ms"] if base and base["fits"] else None,
? a gain is written as a loss
@ test_eviction_pays_where_caches_outweigh_weights

joma/inference/bridge/recall.py
- return above + equal * free / equal.sum(axis=-1, keepdims=True)
+ return above + equal * 1.0
? tokens of one score are all kept
@ test_random_scores_find_k_of_n

joma/inference/bridge/recall.py
- return attn_weights[..., middle:, :middle].sum(axis=-2)
+ return attn_weights[..., :middle].sum(axis=-2)
? the future holds the past
@ test_halves_of_attention_derived_by_hand

joma/inference/bridge/recall.py
- return total / np.arange(middle, 0, -1) if is_mean else total
+ return total / np.arange(1, middle + 1) if is_mean else total
? early tokens are divided by few queries
@ test_halves_of_attention_derived_by_hand

joma/inference/bridge/recall.py
- return (np.cumsum(count) - (count - 1) / 2)[place]
+ return np.cumsum(count)[place]
? equal values have their highest rank
@ test_equal_values_share_their_mean_rank

joma/inference/bridge/one_layer.py
- frequency = classes.class_probs @ classes.probs
+ frequency = classes.probs.sum(axis=0)
? a token's frequency forgets how frequent its classes are
@ test_frequency_is_that_of_all_texts

joma/inference/bridge/one_layer.py
- jax.random.fold_in(jax.random.key(seed), 1),  # Training uses the key.
+ jax.random.key(seed),
? the texts that are measured are those of training
@ test_texts_are_not_those_that_training_draws

joma/inference/bridge/text.py
- starts = np.linspace(0, len(text) - length, number).astype(np.int64)
+ starts = np.linspace(0, len(text), number).astype(np.int64)
? the last stretch runs out of the text
@ test_stretches_spread_over_the_text

joma/inference/sparsity/sparsity_costs.py
- saved = predictor - (1 - kept.query) * query_out
+ saved = -(1 - kept.query) * query_out
? predictors of heads cost nothing
@ test_predicted_heads_read_their_predictor_too

joma/inference/sparsity/sparsity_labels.py
- return jnp.sqrt(jnp.square(to_blocks(hidden, block_size)).sum(axis=-1))
+ return jnp.sqrt(jnp.square(to_blocks(hidden, block_size)).max(axis=-1))
? a block is as strong as its strongest neuron
@ test_blocks_against_loops

joma/inference/sparsity/sparsity_labels.py
- return (bits > least) | (is_equal & (is_equal.cumsum(-1) + num_above <= num))
+ return bits >= least
? ties are all kept
@ test_as_many_as_asked_by_score_then_by_place

joma/inference/sparsity/sparsity_metrics.py
- has_both = counted[:, 1:] & counted[:, :-1]
+ has_both = counted[:, 1:]
? the first counted token has one before it
@ test_the_first_counted_token_has_none_before_it

joma/inference/sparsity/predictors.py
- return x * jax.lax.rsqrt(mean_square + 1e-12)
+ return x
? predictors read the stream as large as it is
@ tests/joma/inference/sparsity/study/predictor_training_test.py
@ test_the_loss_is_the_weighted_cross_entropy

joma/inference/sparsity/study/predictor_training.py
- return np.arange(self.train_rows, self.shards.num_rows)
+ return np.arange(self.shards.num_rows)
? thresholds are calibrated on what was trained on
@ test_held_out_texts_are_never_trained_on

joma/inference/sparsity/study/predictor_training.py
- order = np.maximum(np.arange(layer_in.shape[1]) - is_ahead, 0)
+ order = np.maximum(np.arange(layer_in.shape[1]), 0)
? heads that are predicted ahead learn from their own layer
@ test_look_ahead_reads_a_layer_before

joma/inference/evaluation/evaluate.py
- _NOT_ASKED = -1.0
+ _NOT_ASKED = jnp.nan
? what is not asked for is a fault to JAX_DEBUG_NANS
@ tests/joma/inference/evaluation/evaluate_grid_test.py
@ test_rows_of_a_task

joma/inference/compression.py
- positions = jnp.where(slots < lengths[:, None], slots, -1).astype(jnp.int32)
+ positions = jnp.where(slots <= lengths[:, None], slots, -1).astype(jnp.int32)
? the first slot behind a sequence is kept
@ test_keeps_the_slots_of_the_own_cache

joma/inference/compression.py
- weights = (positions >= 0).astype(jnp.float32)
+ weights = jnp.ones(positions.shape)
? what stands behind a short sequence votes for its keys
@ test_what_stands_behind_a_sequence_does_not_vote

joma/inference/explore/evictions.py
- leaves = is_before & ~kept & (left_at == num_tokens)
+ leaves = is_before & ~kept
? a token leaves anew at every step after it has left
@ test_kept_masks_are_the_caches_own_after_every_token

joma/inference/explore/recording.py
- mass = np.where(self.sinks(), -1.0, self.received)
+ mass = self.received
? sinks take the places of heavy hitters
@ test_sinks_and_heavy_hitters_by_hand

joma/inference/explore/streams.py
- gaps = np.where(is_first, stored, gaps)
+ gaps = np.abs(gaps)
? a query's first key is counted from the last one of the query before
@ test_a_stream_is_the_map_within_half_a_level

joma/inference/explore/streams.py
- rests = np.clip(attention.totals[at] - stored, 0, 1)
+ rests = np.clip(1 - codes[at].astype(float).sum(axis=-1), 0, 1)
? what is left out of a query is nothing
@ test_what_is_not_stored_is_in_the_rest

joma/inference/language_model.py
- if ids and ids[-1] in self.eos_ids:
+ if not ids:
? the token that ends a text is shown as a part of it
@ test_what_ends_a_text_is_not_shown

joma/inference/language_model.py
- maps.append(attn["attn_weights"][0][0])
+ maps.append(attn["attn_weights"][0][0].swapaxes(1, 2))
? keys stand where queries are promised
@ test_weights_are_causal_distributions

joma/systems/probes/maps.py
- behind = weights[:, :, queries, queries - period + 1]
+ behind = weights[:, :, queries, queries - period]
? a head that looks at the same token passes for an induction head
@ test_prefix_matching_is_what_stands_behind_the_same_token
"""
