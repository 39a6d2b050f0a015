"""Faults in `scansnap_jax`, the layer and what it stands on."""

TABLE = """
scansnap_jax/train.py
- lambda *parts: np.concatenate(parts)
+ lambda *parts: np.concatenate(parts[::-1])
? batches are another seed's or step's
@ tests/scansnap_jax/run_test.py
@ test_a_batch_does_not_depend_on_how_many_are_drawn_together

scansnap_jax/metrics.py
- return 1 + (frequency > of_leader).sum(axis=1)
+ return (frequency > of_leader).sum(axis=1)
? the most frequent token has rank 0
@ test_counts_distinct_tokens_that_are_more_frequent

scansnap_jax/data.py
- return occurs & (occurs.sum(axis=0) == 1)
+ return occurs & (occurs.sum(axis=0) <= 2)
? a token of two classes counts as distinct
@ test_a_class_without_distinct_tokens_is_refused

scansnap_jax/data.py
- counts = jax.random.multinomial(key, seq_len - 1, probs)
+ counts = jax.random.multinomial(key, seq_len, probs)
? the context has T tokens, not T - 1
@ test_counts_are_multinomial

scansnap_jax/data.py
- class_cdf, uniform, side="right", method="compare_all"
+ class_cdf, 1 - uniform**2, side="right", method="compare_all"
? classes are not drawn by P(n)
@ test_classes_follow_their_probabilities_and_padding_is_never_drawn

scansnap_jax/data.py
- counts=counts.at[rows, tokens].add(batch.counts),
+ counts=counts.at[rows, tokens].set(batch.counts),
? padding with token 0 overwrites its count
@ test_padding_of_a_short_class_leaves_the_count_of_token_0

scansnap_jax/data.py
- one_hot = jax.nn.one_hot(tokens[:, :-1], num_tokens)
+ one_hot = jax.nn.one_hot(tokens, num_tokens)
? the query counts as context
@ test_sequences_hold_query_last_and_count_like_the_classes

scansnap_jax/model.py
- "Z": jnp.einsum("md,ld->ml", query, key) / width**0.5,
+ "Z": jnp.einsum("md,ld->lm", query, key) / width**0.5,
? Z has tokens in its rows, queries in its columns
@ test_equals_its_reparametrization

scansnap_jax/model.py
- features = dynamics.l2_normalize(attn_weights) if use_l2 else attn_weights
+ features = attn_weights
? attention is not normalized
@ test_equals_the_equations_over_positions

scansnap_jax/model.py
- return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
+ return nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
? parameters start sqrt(3) times too wide
@ test_uniform_start_has_the_width_of_a_linear_layer

scansnap_jax/metrics.py
- return -jax.scipy.special.xlogy(probs, probs).sum(axis=-1)
+ return -jax.scipy.special.xlogy(probs, probs).sum(axis=-1) / jnp.log(2)
? entropy in bits where nats are said
@ test_start_value_of_figure_4

scansnap_jax/metrics.py
- return entropy(mass / jnp.where(total > 0, total, 1)).mean()
+ return entropy(mass).mean()
? the distinct part of attention is not renormalized
@ test_start_value_of_figure_4

scansnap_jax/metrics.py
- above = attended[:, :, None] > thresholds[None, None, :]
+ above = attended[:, :, None] >= thresholds[None, None, :]
? attention at the threshold counts as above it
@ test_what_only_reaches_a_threshold_is_not_above_it

scansnap_jax/metrics.py
- return (times[steepest] + times[steepest + 1]) / 2
+ return times[steepest]
? the snapping time is where the interval starts
@ test_is_the_middle_of_the_steepest_interval

scansnap_jax/flow.py
- jax.tree.map(lambda d, v: d - (1 - momentum) * v, slopes, speeds),
+ jax.tree.map(lambda d, v: d - momentum * v, slopes, speeds),
? friction grows with momentum
@ test_flow_with_momentum_is_the_limit_of_small_momentum_steps

scansnap_jax/flow.py
- return dz, eta_z * dynamics.xi(features, gamma(t))
+ return dz, dynamics.xi(features, gamma(t))
? the exponent lacks the learning rate
@ tests/scansnap_jax/gains_test.py
@ test_gain_grows_by_chi_along_the_attention_flow

scansnap_jax/ensemble.py
- return -(-per_device // self.group_size) * self.group_size
+ return per_device // self.group_size * self.group_size
? members that fill no group are lost
@ test_equals_one_call_a_member

scansnap_jax/ensemble.py
- is_good &= np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
+ is_good &= np.isfinite(leaf).reshape(len(leaf), -1).any(axis=1)
? a member with one finite number is finite
@ test_one_number_that_is_not_finite_makes_its_member_so

scansnap_jax/experiment/checkpoint.py
- for step in reversed(self.all_steps()):
+ for step in self.all_steps():
? a run goes on from the oldest checkpoint
@ test_every_kind_of_leaf_comes_back_equal_and_of_its_kind

scansnap_jax/experiment/saved/leaves.py
- if crc32(body) != saved["crc32"]:
+ if "crc32" not in saved:
? damaged lists of checksums are believed
@ tests/scansnap_jax/experiment/damage/checkpoint_test.py
@ test_changed_metadata_is_noticed

scansnap_jax/experiment/saved/leaves.py
- if body.get("step", step) != step:
+ if body.get("step", step) < 0:
? a checkpoint under the name of another step is taken
@ tests/scansnap_jax/experiment/damage/checkpoint_test.py
@ test_a_step_under_the_name_of_another_is_set_aside

scansnap_jax/experiment/checkpoint.py
- if not digest.is_intact(value, entry):
+ if not digest.is_intact(value, entry) and not value.size:
? arrays with flipped bits are restored
@ tests/scansnap_jax/experiment/damage/checkpoint_test.py
@ test_flipped_bits_in_array_data_are_noticed

scansnap_jax/experiment/processes/digest.py
- if a != b:
+ if a < b:
? some arrays of another shape are no mismatch
@ tests/scansnap_jax/experiment/checkpoint_test.py
@ test_other_shape_is_the_users_error_and_no_damage

scansnap_jax/experiment/processes/digest.py
- return all(crc is None or crc == expected for crc, expected in pairs)
+ return any(crc is None or crc == expected for crc, expected in pairs)
? one intact shard vouches for all
@ test_every_shard_must_have_its_checksum

scansnap_jax/experiment/workdir.py
- return a == b and isinstance(a, bool) == isinstance(b, bool)
+ return a == b
? 1 and true are one setting
@ test_lines_name_the_field_and_both_values

scansnap_jax/experiment/workdir.py
- os.replace(temporary, path)
+ path.write_bytes(data)
? a kill leaves half a file
@ test_who_reads_meanwhile_reads_the_whole_old_file

scansnap_jax/experiment/workdir.py
- fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
+ fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
? two runs share a folder
@ test_a_folder_of_something_else_gets_no_lock

scansnap_jax/experiment/metric_stream.py
- if row["step"] < below or not self._tags.items() <= row.items()
+ if row["step"] <= below or not self._tags.items() <= row.items()
? the step that is written again is kept too
@ test_resumed_file_equals_that_of_one_run

scansnap_jax/experiment/metric_stream.py
- return float(number) if math.isfinite(number) else None
+ return float(number)
? NaN is written where JSON has null
@ test_number_of_any_library_and_null_for_what_json_lacks

scansnap_jax/experiment/require.py
- if not (value > 0 and math.isfinite(value)):
+ if not value > 0:
? infinity is a finite number
@ test_names_setting_bound_and_value

scansnap_jax/experiment/require.py
- if not least <= value <= most:
+ if not least <= value < most:
? the largest value that is allowed is refused
@ test_takes_the_bounds

scansnap_jax/experiment/intervals.py
- error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
+ error = values.std(axis=0) / np.sqrt(len(values))
? the spread of few runs is taken too small
@ test_covers_the_mean_as_often_as_it_says

scansnap_jax/experiment/intervals.py
- half = t_quantile(len(values) - 1) * error
+ half = 1.96 * error
? the interval of few runs is that of infinitely many
@ test_covers_the_mean_as_often_as_it_says

scansnap_jax/experiment/report.py
- return _plain(_INDEX.sub(r"\\1<sub>\\2\\3</sub>", html.escape(text)))
+ return _plain(_INDEX.sub(r"\\1<sub>\\2\\3</sub>", text))
? text of a run becomes markup of the report
@ test_a_name_of_the_users_is_shown_as_it_is

scansnap_jax/experiment/report.py
- ' class="number"' if all(map(_NUMBER.fullmatch, column)) else ""
+ ' class="number"' if any(map(_NUMBER.fullmatch, column)) else ""
? a column of words stands to the right for one number
@ test_columns_of_numbers_are_aligned

scansnap_jax/experiment/processes/rendezvous.py
- self._tell_all(f"{_LOST}{what}")
+ pass
? of three processes the third is told that the first is lost
@ test_the_others_end_in_one_line

scansnap_jax/experiment/processes/rendezvous.py
- self._silence[place] += self._period
+ pass
? one that hangs is waited for without end
@ test_one_that_hangs_is_named_by_all

scansnap_jax/experiment/checkpoint.py
- self._has_failed = True
+ pass
? of a full disk the second thread that fails prints a traceback
@ test_after_a_failure_its_threads_stay_silent

scansnap_jax/experiment/processes/rendezvous.py
- self._silence[place] = 0.0
+ pass
? many short silences are taken for one long one
@ test_two_short_silences_are_no_long_one

scansnap_jax/experiment/processes/rendezvous.py
- return max(self._silence, default=0) > self._timeout / 2
+ return False
? the error that a lost host causes is told, not who is lost
@ test_silence_is_known_at_half_the_time

scansnap_jax/experiment/processes/preemption.py
- if 0 < _grace < seconds:
+ if _grace < seconds:
? a run without a grace period is warned of it
@ test_without_a_grace_nothing_is_said

scansnap_jax/experiment/processes/preemption.py
- _evaluated = _SAID
+ pass
? each evaluation is told to be late
@ test_evaluations_far_apart_are_said_once

scansnap_jax/experiment/processes/preemption.py
- patience.start()
+ pass
? who asked for a stop ends the run without a word
@ test_a_run_that_does_not_come_to_save_ends_in_time

scansnap_jax/experiment/processes/preemption.py
- if signal.getsignal(number) is not signal.SIG_IGN:
+ if number != signal.SIGKILL:
? a run under nohup stops when its terminal closes
@ test_a_signal_that_was_ignored_stays_so

scansnap_jax/experiment/processes/devices.py
- if config.jax_platforms == "cpu":
+ if config.jax_platforms == "none":
? what XLA says before it ends the process is dropped
@ test_a_platform_without_a_device_is_one_sentence

scansnap_jax/experiment/saved/leaves.py
- if not digest.is_intact(array, entry):
+ if array.shape != tuple(entry["shape"]):
? flipped bits of a finished run are given away
@ tests/joma/transformer/checkpoints/export_test.py
@ test_what_is_no_whole_finished_run_is_one_sentence

scansnap_jax/experiment/processes/limits.py
- for group in (place, *place.parents):
+ for group in (place,):
? a job's limit is not that of its steps
@ tests/scansnap_jax/experiment/processes/limits_test.py
@ test_a_control_group_is_the_least_limit

scansnap_jax/experiment/venues/page.py
- sizes = {size: max(SMALLEST, bundle[size]) for size in _SIZES}
+ sizes = {size: bundle[size] for size in _SIZES}
? ticks and legends have six points on ICML's page
@ test_letters_can_be_read_at_the_printed_size

scansnap_jax/experiment/figures.py
- if width <= COLUMN_WIDTH:
+ if width < 0:
? a figure of one panel is not as wide as a column
@ tests/scansnap_jax/experiment/venues/page_test.py
@ test_a_figure_of_one_panel_takes_a_column

scansnap_jax/experiment/metric_stream.py
- self._tell(step, {n: sum(v) / len(v) for n, v in told.items()})
+ self._tell(step, {n: v[-1] for n, v in told.items()})
? trackers show the last run, not the mean
@ test_of_runs_the_means_go_there_and_the_rows_to_the_file

scansnap_jax/experiment/trackers/weights_and_biases.py
- id=_id_of(workdir / "wandb" / stream),
+ id=_id_of(workdir / "wandb"),
? all series of a workdir are one run of wandb, which drops steps that go back
@ tests/scansnap_jax/experiment/trackers/tracker_test.py
@ test_wandb_is_told_everything_as_one_run
"""
