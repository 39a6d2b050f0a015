"""Faults in `joma.theory` and `joma.hierarchy`."""

TABLE = """
joma/theory/dynamics.py
- shared = b * jnp.sum(b * back, axis=-1, keepdims=True)
+ shared = b * jnp.mean(b * back, axis=-1, keepdims=True)
? the shared term of softmax is a mean, not a sum
@ test_closed_form_equals_automatic_differentiation

joma/theory/dynamics.py
- back = gh @ state.v.T / block.temperature
+ back = gh @ state.v.T
? the temperature has no part in the slope
@ test_closed_form_equals_automatic_differentiation

joma/theory/dynamics.py
- return jax.tree.map(jnp.negative, jax.grad(total)(params))
+ return jax.grad(total)(params)
? the loss is climbed
@ tests/joma/theory/flow_test.py
@ test_reduced_flow_is_the_same_without_the_width

joma/theory/dynamics.py
- "quadratic": lambda h: h**2 / 2,
+ "quadratic": lambda h: h**2,
? the theory's quadratic has slope h, this one 2 h
@ tests/joma/theory/isotropic_test.py
@ test_quadrature_equals_closed_form

joma/theory/flow.py
- eta_z * slope.attn_logits,
+ eta_w * slope.attn_logits,
? attention learns at the rate of the weights
@ tests/joma/theory/invariants_test.py
@ test_holds_while_the_layer_above_trains

joma/theory/flow.py
- return scaled, eta_z * shared.sum(axis=0)
+ return scaled, shared.sum(axis=0)
? the correction of softmax lacks the rate of attention
@ tests/joma/theory/invariants_test.py
@ test_holds_while_the_layer_above_trains

joma/theory/invariants.py
- change = rate_ratio / (2 * temperature) * growth
+ change = rate_ratio / 2 * growth
? the law has no temperature
@ test_holds_while_the_layer_above_trains

joma/theory/invariants.py
- middle = (attended[1:] + attended[:-1]) / 2
+ middle = attended[:-1]
? attention is integrated by its left ends
@ test_one_context_leaves_the_drift_of_b_bar_as_the_only_error

joma/theory/invariants.py
- terms = attn_logits**2 if attention == "linear" else attn_logits
+ terms = attn_logits
? the law of linear attention is that of exp
@ test_error_falls_linearly

joma/theory/isotropic.py
- return jnp.stack([terms.sum(axis=1), (y * terms).sum(axis=1)])
+ return jnp.stack([terms.sum(axis=1), terms.sum(axis=1)])
? the second moment is the first
@ test_quadrature_equals_closed_form

joma/theory/isotropic.py
- return (amounts * along_center) @ centers + amounts @ along_v / norm * v
+ return (amounts * along_center) @ centers + amounts @ along_v * v
? the part along v grows with its norm
@ test_clouds_need_not_be_gaussian

joma/theory/metrics.py
- return _ratio(trace, jnp.linalg.eigvalsh(gram)[..., -1])
+ return _ratio(trace, jnp.linalg.eigvalsh(gram)[..., 0])
? the stable rank divides by the least eigenvalue
@ test_by_hand

joma/theory/metrics.py
- return jnp.where(error == 0, 0, error / jnp.linalg.norm(measured))
+ return jnp.where(error == 0, 0, error / jnp.linalg.norm(predicted))
? the error is relative to the prediction
@ test_by_hand

joma/theory/metrics.py
- pooled = activations.max(axis=1)
+ pooled = activations.mean(axis=1)
? nodes are pooled by the mean over tokens
@ test_best_pooled_node_counts

joma/theory/winner.py
- return delta * jnp.exp((sharpness * v) ** 2 / 2)
+ return delta * jnp.exp((sharpness * v) ** 2)
? attention sharpens twice as fast
@ test_relation_holds_along_the_real_flow

joma/theory/winner.py
- return math.sqrt(math.pi / 2) / (sharpness * jnp.abs(delta).max())
+ return math.sqrt(math.pi / 2) / (sharpness * jnp.abs(delta).min())
? the slowest component blows up first
@ test_time_and_limits_scale_with_sharpness

joma/theory/winner.py
- return v * cosh + attn_logits * sinh, attn_logits * cosh + v * sinh
+ return v * cosh + attn_logits * sinh, attn_logits * cosh - v * sinh
? linear attention turns where it should grow
@ test_closed_form_is_the_flow

joma/theory/convergence.py
- return jnp.exp(jnp.asarray(mu_j**2 - mu_k**2) / 2)
+ return jnp.exp(jnp.asarray(mu_k**2 - mu_j**2) / 2)
? the ratio's limit is upside down
@ test_lambda_tends_to_its_limit

joma/theory/convergence.py
- return -jnp.log1p(-v / jnp.broadcast_to(mu, v.shape))
+ return -jnp.log(v / jnp.broadcast_to(mu, v.shape))
? what is reached is taken for the gap
@ test_agrees_with_an_integration_of_v

joma/theory/convergence.py
- return metrics.attention_entropy(v**2 / temperature)
+ return metrics.attention_entropy(v**2 / (2 * temperature))
? attention is less sharp than figure 4's
@ test_falls_then_rises_only_with_attention

joma/theory/cooccurrence.py
- between = polarity ** (2 * (num_depths - 1 - depth))
+ between = polarity ** (2 * (num_depths - depth))
? two leaves are one edge pair further apart
@ test_equals_enumeration_at_every_depth

joma/theory/cooccurrence.py
- mean = rho * mean[parents]
+ mean = mean[parents]
? the mean does not fade down the tree
@ test_equals_enumeration_in_an_irregular_tree

joma/theory/data.py
- keeps = jnp.broadcast_to((1 + jnp.asarray(rho)) / 2, shape)
+ keeps = jnp.broadcast_to(jnp.asarray(rho), shape)
? a child agrees with its parent too rarely
@ test_frequencies_are_the_trees_probabilities

joma/theory/data.py
- return jnp.where(is_token, order - shift, num_tokens)
+ return jnp.where(is_token, order, num_tokens)
? packed ids are moved by the padding
@ test_random_order_moves_tokens_but_not_padding

joma/hierarchy/data.py
- return np.asarray(held.any(axis=0) & ~held.all(axis=0))
+ return np.asarray(held.any(axis=0))
? a latent that all classes hold counts as used
@ test_latents_of_no_class_or_of_all_are_not_used

joma/hierarchy/data.py
- found = found[_first_of_each(found)]
+ found = found[: len(found)]
? two latents may be one set
@ test_fraction_of_unused_latents

joma/hierarchy/data.py
- rows = np.concatenate([seen, hierarchy.tokens_of(drawn)])
+ rows = np.concatenate([seen[:0], hierarchy.tokens_of(drawn)])
? unseen classes may have been seen
@ test_are_all_there_are_if_more_are_asked_for

joma/hierarchy/model.py
- mask = jnp.tril(jnp.ones((length, length), bool))[-ending.shape[1] :]
+ mask = jnp.ones((length, length), bool)[-ending.shape[1] :]
? tokens see those after them
@ test_equal_those_of_loops_over_positions

joma/hierarchy/model.py
- log_copies = jnp.log(jnp.asarray(num_padding, attn_logits.dtype))
+ log_copies = jnp.asarray(num_padding, attn_logits.dtype) - 1
? merged padding weighs more than its copies
@ test_a_merged_token_carries_what_its_copies_do

joma/hierarchy/scores.py
- centered = values - weights @ values[None]
+ centered = values - values.mean(axis=0, keepdims=True)
? weighted correlations are centred without weights
@ test_weights_are_repetitions

joma/hierarchy/scores.py
- shuffled=jax.lax.map(shuffle, keys).mean(axis=0),
+ shuffled=jax.lax.map(shuffle, keys).max(axis=0),
? the null score is the best of the shuffles
@ test_shuffled_is_the_best_node_for_permuted_latents

joma/hierarchy/scores.py
- transferred=jnp.take_along_axis(unseen, best, axis=1)[:, 0],
+ transferred=unseen.max(axis=1),
? transferred scores choose their node anew
@ test_a_network_that_found_the_latents_stands_out

joma/studies/theories/max_margin.py
- gaps = scores[:, :, None] - scores[:, None]
+ gaps = scores[:, :, None] + scores[:, None]
? pairs of tokens pull by their sum
@ test_both_forms_are_minus_the_gradient

joma/studies/theories/margins.py
- missing = 1 - rows @ start.ravel()
+ missing = 1 + rows @ start.ravel()
? what is there already counts as missing
@ tests/joma/studies/theories/max_margin_test.py
@ test_no_direction_lowers_the_nuclear_norm

joma/studies/theories/composed.py
- found = np.einsum("FI,FJ,FK->IJK", a, b, c.conj())[1:, 1:, 1:] / goal
+ found = np.einsum("FI,FJ,FK->IJK", a, b, c)[1:, 1:, 1:] / goal
? the vote is taken at the opposite frequency
@ test_a_network_of_waves_is_a_solution_by_loss_and_by_sums

joma/studies/theories/dormant.py
- slopes = (logit * (first - others) * p * rest, value * p, value * rest)
+ slopes = (logit * (first - others) * p, value * p, value * rest)
? the sigmoid's slope lacks a factor
@ test_velocity_is_minus_the_gradient

joma/studies/theories/loss_sparsity.py
- return jnp.logaddexp(0.0, -labels * found).mean()
+ return jnp.logaddexp(0.0, labels * found).mean()
? the logistic loss wants the other label
@ test_a_step_follows_the_slope_and_records_what_is_there

joma/studies/theories/incremental_rank.py
- return jnp.square(error).sum(axis=-1).mean() / 2
+ return jnp.square(error).mean() / 2
? a mean over coordinates, which slows the flow
@ test_a_step_goes_down_the_slope_of_the_loss

joma/studies/theories/in_context.py
- return values, (1 + 1 / n) * values**2 + values.sum() / n * values
+ return values, values**2 + values.sum() / n * values
? the same example counts once in a fourth moment
@ test_mean_loss_is_that_of_drawn_prompts

joma/studies/theories/in_context.py
- near = np.abs(curve[start:end, None] / known[1:-1] - 1) < _NEAR
+ near = np.abs(curve[:end, None] / known[:-1] - 1) < _NEAR
? the time before the descent counts as waiting
@ test_waiting_is_the_share_of_steps_near_a_level

joma/studies/theories/markov_chains.py
- previous = distance_weights(params["distance"]) @ symbols
+ previous = symbols + 0 * distance_weights(params["distance"]) @ symbols
? the second layer matches the symbol itself, not the one before
@ test_two_layers_by_loops

joma/studies/theories/markov_chains.py
- seen[rows, now] += 1
+ seen[rows, following] += 1
? the unigram knows the answer
@ test_references_are_counts_plus_one

joma/studies/theories/induction.py
- (first < second).all(),
+ (first > second).all(),
? the order of the layers is turned around
@ test_the_layer_that_forms_first_is_told

joma/studies/theories/adam_order.py
- own = np.flatnonzero(is_own)[np.argsort(-probs[is_own], kind="stable")]
+ own = np.flatnonzero(is_own)[np.argsort(probs[is_own], kind="stable")]
? ranks go from the rarest
@ test_ranks_go_from_the_most_frequent

joma/studies/theories/dilution.py
- is_falling, best = not is_falling, i
+ is_falling = not is_falling
? an extreme is sought from where the last movement began
@ test_extremes_are_those_beyond_the_bound

joma/studies/theories/dilution.py
- shares = np.cumsum(symbols, axis=1) / number
+ shares = symbols
? the direction is that of bigrams, as if attention were on the query
@ test_first_direction_is_that_of_shares_and_what_follows
"""
