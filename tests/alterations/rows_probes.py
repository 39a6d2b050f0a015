"""Faults in probes, read-outs and their studies."""

TABLE = """
joma/systems/probes/drift.py
- return entropy((one + two) / 2) - (entropy(one) + entropy(two)) / 2
+ return entropy((one + two) / 2) - entropy(one)
? a head that is sharper in a conflict has drifted less
@ test_is_the_divergence_of_what_roles_get

joma/systems/probes/drift.py
- order = np.argsort(-np.asarray(scores), axis=None, kind="stable")
+ order = np.argsort(np.asarray(scores), axis=None, kind="stable")
? the head that drifts least is the first
@ test_heads_are_ranked_by_layer_and_place

joma/transformer/training/optimizer.py
-       if not is_updated(path, layers):
-         return value
+       if layers is None:
+         return value
? what is left out of an update decays
@ test_layers_that_are_left_out_stay_to_the_bit

joma/transformer/training/optimizer.py
-             grad if is_updated(path, layers) else jnp.zeros_like(grad)
+             grad if is_updated(path, layers) else grad
? gradients of what is left out are clipped with the others
@ test_layers_that_are_left_out_stay_to_the_bit

joma/studies/systems/probes/head_drift.py
- chosen = layers[rows, focal]
+ chosen = layers.max(axis=1)
? the best layer passes for the one that drifts
@ test_claims_are_of_the_layer_that_drifts_most

joma/systems/probes/recall.py
- mlps.append(hidden @ monarch.kernel_of(down) + mlp_bias[None])
+ mlps.append(hidden @ monarch.kernel_of(down))
? an MLP's bias is nobody's
@ test_parts_add_up_to_the_logits

joma/systems/probes/recall.py
- part = part - part.mean(axis=-1, keepdims=True)
+ part = part - 0 * part.mean(axis=-1, keepdims=True)
? a head's mean, which the norm takes off, is in the logits
@ test_a_head_adds_what_its_rows_of_the_output_projection_make

joma/systems/probes/recall.py
- y, x = mlp - mlp.mean(axis=0), heads - heads.mean(axis=0)
+ y, x = mlp, heads
? the constant of the task counts as what heads explain
@ test_a_planted_sum_is_found

joma/systems/probes/patching.py
- chosen = jnp.einsum("BT,N->BTN", is_token, self.is_patched)
+ chosen = jnp.einsum("BT,N->BTN", is_token | True, self.is_patched)
? heads are patched at every token
@ test_a_patched_head_says_what_it_said_of_the_other_text

joma/systems/readouts/pair_head.py
- parts = [one, two, one * two, jnp.abs(one - two)]
+ parts = [one, two, one * two, jnp.abs(one + two)]
? a pair head is told of the sum for the distance
@ test_is_an_mlp_of_four_features

joma/systems/readouts/boxes.py
- return iou(one, two) - (around - either) / around
+ return iou(one, two) - (around - either) / either
? GIoU has no bound below
@ test_giou_is_that_of_areas

joma/systems/readouts/boxes.py
- both = jnp.maximum(most - least, 0).prod(axis=-1)
+ both = (most - least).prod(axis=-1)
? boxes that are apart in both directions overlap
@ test_giou_is_that_of_areas

joma/systems/score_rules/grid_bias.py
- column = apart[1] + self.columns - 1
+ column = jnp.abs(apart[1]) + self.columns - 1
? what lies to the left is as what lies to the right
@ test_is_of_row_and_column_distance

joma/systems/score_rules/grid_bias.py
- found = jnp.where(inside[..., None], found, 0)
+ found = jnp.where(inside[..., None] | True, found, 0)
? a word in front of a grid lies on it
@ test_is_of_row_and_column_distance

joma/studies/systems/subjects/grid_scenes.py
- column += jnp.where(label == 0, 0, size - apart)
+ column += jnp.where(label == 0, 0, 0 * apart)
? marks of both classes are on one row
@ tests/joma/studies/systems/readouts/grid_test.py
@ test_marks_are_as_far_on_one_row_as_on_two

joma/studies/systems/probes/update_rank.py
- product = path[:, i] @ product
+ product = product @ path[:, i]
? factors are multiplied from the wrong side
@ test_a_product_that_was_made_is_read

joma/studies/systems/probes/update_rank.py
- product = factor @ product
+ product = factor + product
? what descends is no product
@ test_two_factors_follow_the_closed_form

joma/studies/systems/probes/recall.py
- [(run([head])[0] - before)[is_first].mean() for head in range(count)]
+ [(run([head])[0] - before).mean() for head in range(count)]
? heads are found on the subjects that they are judged by
@ test_heads_are_found_by_what_they_move_of_the_first_half

joma/studies/systems/subjects/associations.py
- others = jnp.broadcast_to(order.reshape(2, half)[place // half], shape)
+ others = jnp.broadcast_to(order.reshape(2, half)[1 - place // half], shape)
? the other subject is one that was not to be used
@ tests/joma/studies/systems/probes/recall_test.py
@ test_pairs_are_of_one_relation_one_half_and_two_answers

joma/studies/systems/subjects/calibrated_heads.py
- mean = weights[:, :, :num_prompt].mean(axis=2)
+ mean = weights.mean(axis=2)
? what follows the prompt chooses columns for it
@ tests/joma/studies/systems/act_test.py
@ test_columns_are_of_the_prompt_and_never_the_first

joma/studies/systems/subjects/calibrated_heads.py
- return (mean > theta).at[..., 0].set(False)
+ return mean > theta
? the first column is turned down
@ tests/joma/studies/systems/act_test.py
@ test_it_is_what_a_prompt_and_steps_of_the_system_give

joma/studies/systems/act.py
- found[head] = subject.losses(tokens, alone, theta, beta).mean() < plain
+ found[head] = subject.losses(tokens, alone, theta, beta).mean() <= plain
? heads that change nothing pass for such that help
@ test_found_are_those_that_help_alone_among_loud_ones

joma/systems/of_system.py
- return one_by_one.but_first(cls.take, cls.attend, self, *arguments)
+ return cls.take(self, *arguments)
? a second prompt is read as if nothing came before it
@ tests/joma/systems/conformance_test.py
@ test_a_second_prompt_goes_on_from_the_first

scansnap_jax/experiment/require.py
-   if not largest < np.sqrt(np.finfo(np.float32).max):
+   if not largest < np.inf:
? a norm makes the loss of a guess of weights of any size
@ tests/joma/systems/reuse/distillation_test.py
@ test_what_diverged_is_refused

scansnap_jax/experiment/require.py
-   largest = np.max([abs(leaf).max() for leaf in leaves])
+   largest = np.max([leaf.max() for leaf in leaves])
? weights that are far below zero are as good as none
@ tests/joma/systems/reuse/distillation_test.py
@ test_what_diverged_is_refused
"""
