"""Faults in `joma.inference` where several tokens or sequences go together."""

TABLE = """
joma/inference/cache/trial.py
- stays = (at < counts)[:, None]
+ stays = (at <= counts)[:, None]
? one token too many leaves its vectors
@ test_what_is_taken_back_has_never_come

joma/inference/cache/trial.py
- numbers = jax.tree.map(lambda x: x[counts, rows], notes.numbers)
+ numbers = jax.tree.map(lambda x: x[-1, rows], notes.numbers)
? scores and positions are those of tokens that were taken back
@ test_what_is_taken_back_has_never_come

joma/inference/speculative/rule.py
- rest = jnp.maximum(here(target) - here(draft), 0)
+ rest = here(target)
? what is refused may be drawn once more
@ test_texts_have_the_models_probabilities

joma/inference/speculative/rule.py
- uniforms * of_guess(draft) < of_guess(target[:, :-1])
+ uniforms < of_guess(target[:, :-1])
? guesses stay with the model's probability, however they were drawn
@ test_texts_have_the_models_probabilities

joma/inference/speculative/rule.py
- return jnp.cumprod(stays.astype(jnp.int32), axis=1).sum(axis=1)
+ return stays.sum(axis=1)
? a guess behind a wrong one counts
@ test_greedy_guesses_stay_up_to_the_first_that_is_wrong

joma/inference/speculative/rounds.py
- return jnp.minimum(counts, first + 1).astype(jnp.int32)
+ return counts.astype(jnp.int32)
? a text goes on behind its end within a round
@ tests/joma/inference/speculative/streaming_test.py
@ test_a_sequence_ends_at_its_end_of_text_within_a_round

joma/inference/speculative/rounds.py
- jax.vmap(uniform)(keys(1)),
+ jax.vmap(uniform)(keys(1)) / 2,
? guesses stay too often
@ tests/joma/inference/speculative/streaming_test.py
@ test_drawn_pairs_have_the_models_probabilities

joma/inference/speculative/drafts.py
- run * text.shape[1] + place * (run > 0)
+ run * text.shape[1] - place * (run > 0)
? of places of one length the first counts
@ test_an_end_that_stood_before_is_found

joma/inference/serving/rows.py
- is_free=rows.is_free | is_over,
+ is_free=is_over,
? whoever has left goes on
@ tests/joma/inference/serving/batch_test.py
@ test_who_has_left_stays_away_while_others_go_on

joma/inference/serving/rows.py
- return jax.vmap(of_row)(rows.num_new)
+ return sampling.row_keys(of_row(rows.num_new[0]), len(rows.num_new))
? a sequence draws by the place that it has
@ tests/joma/inference/serving/batch_test.py
@ test_neighbours_change_nothing

joma/inference/serving/batch.py
- starts=[start],
+ starts=[0],
? what follows a prefix is read as if it began the text
@ tests/joma/inference/serving/batch_test.py
@ test_a_prefix_is_copied_and_not_read_again
"""
