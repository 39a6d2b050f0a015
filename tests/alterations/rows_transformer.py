"""Faults in `joma.transformer`: layers, positions, text, checkpoints."""

TABLE = """
joma/transformer/mlp.py
- return jax.checkpoint(lambda gate, up: activation(gate) * up)(
+ return jax.checkpoint(lambda gate, up: activation(gate) + up)(
? the gate adds
@ test_equals_numpy

joma/transformer/mlp.py
- return 1 / (2 * config.num_layers) if shrink else 1.0
+ return 1 / config.num_layers if shrink else 1.0
? the residual stream grows with depth
@ test_residual_scale_shrinks_what_enters_the_stream

joma/transformer/layers/monarch.py
- between = jnp.einsum("...ap,apjr->...jar", x, right)
+ between = jnp.einsum("...ap,apjr->...ajr", x, right)
? blocks are not permuted between the factors
@ test_the_product_is_two_block_diagonals_and_a_permutation

joma/transformer/layers/monarch.py
- blocks, matrix.shape[0] // blocks, -1, blocks
+ blocks, matrix.shape[0] // blocks, blocks, -1
? slices are of neighbouring outputs, which the product does not have
@ test_a_projection_leaves_out_the_last_singular_values

joma/transformer/norm.py
- y = _along_last(scale + self.scale_offset, y) * y
+ y = _along_last(scale, y) * y
? Gemma's norms lack their 1
@ test_equals_numpy

joma/transformer/norm.py
- y = y * jax.lax.rsqrt(mean_square + self.epsilon)
+ y = y * jax.lax.rsqrt(mean_square) + self.epsilon
? a row of zeros becomes NaN
@ test_equals_numpy

joma/transformer/full_cache.py
- starts = jnp.maximum(stops - window, 0)
+ starts = jnp.maximum(stops - window - 1, 0)
? a window is one token too long
@ test_pieces_of_any_length_give_what_the_whole_gives

joma/transformer/full_cache.py
- slots = jnp.where(positions < 0, capacity, positions)
+ slots = jnp.where(positions < 0, 0, positions)
? padding is written over the first token
@ test_padding_is_neither_kept_nor_seen

joma/transformer/rope/rotary.py
- turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
+ turned = jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)
? positions turn the other way
@ test_quarter_turns_pair_the_halves_and_leave_the_rest

joma/transformer/rope/rotary.py
- stretch = stretch * _longer(seq_len, max_len) - (stretch - 1)
+ stretch = stretch * _longer(seq_len, max_len)
? dynamic scaling stretches within the trained length
@ test_dynamic_base_grows_with_the_text

joma/transformer/rope/rotary.py
- return plain * (1 - ramp) + plain / _stretch(config, max_len) * ramp
+ return plain * ramp + plain / _stretch(config, max_len) * (1 - ramp)
? YaRN stretches the fast pairs
@ test_yarn_ramp_derived_by_hand

joma/transformer/rope/rotary.py
- seq_len = positions.max(axis=1) + 1
+ seq_len = positions.max(axis=1)
? the length of a text is its last position
@ test_each_sequence_turns_by_its_own_length_under_one_compilation

joma/transformer/rope/config.py
- return rotary_dim / (rotary_dim - 2)
+ return (rotary_dim - 2) / rotary_dim
? NTK's exponent is upside down
@ tests/joma/transformer/rope/rotary_test.py
@ test_dynamic_base_grows_with_the_text

joma/transformer/rope/config.py
- if self.factor is not None and self.factor < 1:
+ if self.factor is not None and self.factor < 0:
? positions may be compressed below the trained ones
@ test_setting_that_cannot_be_meant_is_refused

joma/transformer/rope/bounds.py
- return squares * fraction * (1 - fraction) / 2
+ return squares * fraction * (1 - fraction)
? the bound is twice the theorem's
@ test_bound_is_nearly_reached

joma/transformer/text/batches.py
- return Batch(ids[:, :-1], ids[:, 1:], weights)
+ return Batch(ids[:, :-1], ids[:, :-1], weights)
? the targets are the inputs
@ test_targets_come_next_and_shapes_are_the_same

joma/transformer/text/batches.py
- length = min(self.seq_len, self._stretch - 1 - first)
+ length = min(self.seq_len, self._stretch - first - 2)
? the last token of a stretch is never predicted
@ test_a_stretch_that_fills_its_batches_has_no_empty_one

joma/transformer/text/batches.py
- return Batch(pad(ids[:, :-1]), pad(ids[:, 1:]), pad(weights))
+ return Batch(pad(ids[:, :-1]), pad(ids[:, 1:]), np.ones_like(pad(weights)))
? padding counts in the loss
@ test_evaluation_counts_every_target_once

joma/transformer/text/batches.py
- return slice(process_index * share, (process_index + 1) * share)
+ return slice(process_index, process_index + share)
? processes read rows of each other
@ test_rows_of_all_processes_are_the_batch

joma/transformer/text/corpus.py
- dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
+ dtype = np.uint16
? ids of large vocabularies wrap around
@ test_ids_of_a_large_vocabulary_keep_their_value

joma/transformer/text/corpus.py
- key = _sha256(_sha256(data).encode() + described)
+ key = _sha256(data)
? another tokenizer finds the ids of the first
@ test_another_tokenizer_does_not_find_the_ids_of_the_first

joma/transformer/text/corpus_text.py
- second = round((fractions[0] + fractions[1]) * len(data))
+ second = round(fractions[1] * len(data))
? the validation text is cut from the wrong place
@ test_a_file_is_cut_at_line_ends_and_nothing_is_lost

joma/transformer/text/corpus_text.py
- is_published = tuple(text.files.values()) == expected
+ is_published = bool(expected)
? any files pass for the published ones
@ test_published_names_are_found

joma/transformer/text/tokenizer.py
- ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
+ ordered = sorted(counts.items(), key=lambda item: -item[1])
? words of one count are numbered by where they came first
@ test_ids_are_by_falling_frequency_then_by_characters

joma/transformer/text/streaming.py
- self._shown = shown
+ self._shown = ""
? streamed text repeats itself
@ tests/joma/transformer/text/streaming_test.py
@ test_a_character_comes_whole_with_its_last_byte

joma/transformer/text/tokenizer.py
- wrong = array[(array < 0) | (array >= vocab_size)]
+ wrong = array[array > vocab_size]
? an id beyond the vocabulary is decoded
@ test_an_id_outside_of_the_vocabulary_is_named

joma/transformer/hf/fields.py
- window = fields.get("sliding_window", 4096) if use_window else None
+ window = fields.get("sliding_window", 4096)
? Qwen's window is on where config.json has it off
@ tests/joma/transformer/hf/config_json_test.py
@ test_what_it_cannot_describe_is_named

joma/transformer/hf/fields.py
- "rope": rope_config.from_hf(fields),
-       "embed_scale": known["embed_dim"] ** 0.5,
+ "rope": rope_config.from_hf(fields),
+       "embed_scale": 1.0,
? Gemma's embeddings are not scaled
@ tests/joma/transformer/hf/config_json_test.py
@ test_what_a_family_cannot_say_is_named

joma/transformer/hf/fields.py
- "attn_logits_soft_cap": fields.get("attn_logit_softcapping", 50.0),
+ "attn_logits_soft_cap": fields.get("final_logit_softcapping", 50.0),
? attention is capped like the output
@ tests/joma/transformer/hf/config_json_test.py
@ test_a_family_is_found_that_can_describe_it

joma/transformer/hf/fields.py
- _SLIDING if window and layer >= first else _FULL
+ _SLIDING if window and layer > first else _FULL
? the first layer with a window has none
@ tests/joma/transformer/hf/config_json_test.py
@ test_silence_means_what_transformers_takes_it_for

joma/transformer/hf/config_json.py
- known.setdefault("num_kv_heads", known["num_heads"])
+ known.setdefault("num_kv_heads", 1)
? a file without KV heads is read as multi-query
@ test_sizes_that_are_absent_are_derived

joma/transformer/hf/config_json.py
- known.setdefault("hidden_dim", 4 * known["embed_dim"])
+ known.setdefault("hidden_dim", known["embed_dim"])
? GPT-2 without n_inner has a narrow MLP
@ test_sizes_that_are_absent_are_derived

joma/transformer/layers/scanning.py
- layers = [node[f"layers_{number}"] for number in sorted(numbers)]
+ layers = [node[name] for name in sorted(node) if _ONE.fullmatch(name)]
? layer 10 comes before layer 2
@ test_layers_are_put_together_in_their_order_and_taken_apart

joma/transformer/model.py
- "dots": policies.dots_with_no_batch_dims_saveable,
+ "dots": None,
? dots computes whole layers anew
@ tests/joma/transformer/layers/scanning_test.py
@ test_policies_compute_different_things_anew

joma/transformer/sharding.py
- return P(None, *partition_spec(one, shape[1:], mesh))
+ return partition_spec(one, shape[1:], mesh)
? the axis of layers is split in place of the first of the parameters
@ tests/joma/transformer/layers/scanning_test.py
@ test_axes_of_a_stack_are_those_of_a_layer

joma/transformer/training/init.py
- if model.config.scan_layers:  # The same numbers, whatever the layout.
+ if False:
? a model as one layer starts from other numbers
@ tests/joma/transformer/layers/scanning_test.py
@ test_a_state_of_training_is_of_either_layout

joma/transformer/config.py
- if len(set(self.windows)) > 1:
+ if len(set(self.windows)) > self.num_layers:
? all layers get the window of the first
@ tests/joma/transformer/layers/scanning_test.py
@ test_layers_that_differ_are_refused_with_the_reason

joma/transformer/training/lm_step.py
- is_good = jnp.isfinite(optax.tree.norm(grads)) & (loss <= limit)
+ is_good = jnp.isfinite(optax.tree.norm(grads))
? a loss above the limit is learned from
@ tests/joma/transformer/training/divergence_test.py
@ test_a_loss_above_the_limit_is_not_learned_from

joma/transformer/training/divergence.py
- state = state._replace(step=0 * state.step + interval.end)
+ state = state._replace(step=state.step)
? a run that goes back reads other batches than its counter says
@ test_a_state_that_comes_back_counts_on

joma/transformer/sharding.py
- has_heads = len(shape) > 1 and shape[1] == num_kv_heads
+ has_heads = False
? every device keeps the slots of all key heads
@ tests/joma/inference/on_mesh_test.py
@ test_sequences_and_key_heads_are_split

joma/transformer/checkpoints/export.py
- steps = steps[: steps.index(last) + 1]
+ steps = steps[: steps.index(last)]
? a run gives away the step before its last
@ tests/joma/transformer/checkpoints/export_test.py
@ test_a_step_becomes_a_model_with_its_tokenizer

joma/transformer/text/corpus.py
- if learned is not None and learned.key == key:
+ if learned is not None:
? a tokenizer that was learned of another text is taken
@ tests/joma/transformer/training/run_test.py
@ test_what_was_learned_is_not_learned_again

joma/transformer/training/run.py
- if number is None:
+ if True:
? a run that began with more tokens than its text has cannot go on
@ tests/joma/transformer/training/run_test.py
@ test_a_run_that_goes_on_keeps_its_number

joma/transformer/hf/hub.py
- if found is None or path.exists():
+ if found is None:
? a folder that is there is looked for on Hugging Face
@ test_a_folder_that_is_there_is_no_name

joma/transformer/hf/hub.py
- patterns = [*_SMALL, *(["*.safetensors"] if weights else [])]
+ patterns = [*_SMALL, "*.safetensors"]
? whoever wants config.json alone downloads all weights
@ test_without_weights_they_stay_where_they_are

joma/transformer/hf/hub.py
- revision=revision,
+ revision=None,
? every revision is main
@ test_without_weights_they_stay_where_they_are

joma/transformer/layers/products.py
- if not is_plain or sharding.current_mesh() is not None:
+ if x.ndim > 2 or not is_plain or sharding.current_mesh() is not None:
? gradients of kernels turn the hidden layer, at three times the time
@ test_no_gradient_of_an_mlp_turns_its_hidden_units

joma/transformer/layers/products.py
- is_plain = contracted == last and not any(dimension_numbers[1])
+ is_plain = not any(dimension_numbers[1])
? a product over other axes is one over the last
@ test_other_axes_are_handed_on

joma/transformer/layers/cross_entropy.py
- x = x[:, :, : length // num_parts]
+ x = x[:, :, -(length // num_parts) :]
? the filled-up end of the last piece counts, its beginning does not
@ test_come_together_again

joma/transformer/layers/cross_entropy.py
- x = x.reshape(batch, num_parts, length // num_parts, *rest)
+ x = x.reshape(batch, length // num_parts, num_parts, *rest).swapaxes(1, 2)
? a piece takes positions of other devices than its own
@ test_hold_as_much_of_every_part

joma/transformer/model.py
- nn.remat(one, prevent_cse=False),
+ one,
? logits of all pieces wait for the backward pass
@ tests/joma/transformer/layers/cross_entropy_test.py
@ test_pieces_hold_less

scansnap_jax/experiment/workdir.py
- and not (found is _ABSENT and asked is None)
+ 
? a run that an earlier version began is another's
@ test_lines_name_the_field_and_both_values
"""
