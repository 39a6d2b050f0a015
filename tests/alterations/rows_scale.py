"""Faults in `joma/scale`: programs, exchanges, work, tori, estimates."""

TABLE = """
joma/scale/program.py
- yield from _walk(program, body, times * (trips or 1), unknown)
+ yield from _walk(program, body, times, unknown)
? the body of a loop counts once, however often it runs
@ test_loops_run_as_often_as_their_conditions_say

joma/scale/program.py
- return -(-(limit - first) // step)
+ return -(-limit // step)
? a loop that starts above 0 is taken to run too often
@ test_loops_run_as_often_as_their_conditions_say

joma/scale/program.py
- return int(said[1])
+ pass
? a loop of a GPU's program, which says how often it runs, counts once
@ test_a_loop_that_says_how_often_is_believed

joma/scale/interconnect.py
- if not peaks.PEAKS[self.chip].ici_dims:
+ if not peaks.PEAKS[self.chip].ici_bytes_per_sec:
? GPUs at a switch, which need no neighbour, send as along a line
@ test_gpus_send_to_any_others_with_all_they_have

joma/scale/work.py
- silent += _GPU_KERNEL.search(run.instruction.attributes) is not None
+ pass
? what kernels for GPUs do not declare is not said to be absent
@ test_a_kernel_for_gpus_declares_none

joma/scale/plan_config.py
- return of_slice * self.num_slices
+ return of_slice
? several slices have the devices of one
@ tests/joma/scale/meshes_test.py
@ test_what_cannot_be_planned_is_refused

joma/scale/plan_config.py
- if self.num_slices > 1 and self.chip not in has_network:
+ if self.num_slices > 2 and self.chip not in has_network:
? slices of a chip whose network no page gives exchange in no time
@ tests/joma/scale/meshes_test.py
@ test_what_cannot_be_planned_is_refused

joma/scale/estimate.py
- cache_split = self.batch_split * self.tensor
+ cache_split = self.data * self.fsdp * self.tensor
? texts that no device can split are counted in parts
@ tests/joma/scale/meshes_test.py
@ test_a_batch_that_does_not_divide_is_copied_in_decoding

joma/scale/interconnect.py
- inside = whole * (within - 1) / within
+ inside = sent_bytes
? what goes over the network is counted within slices, too
@ test_seconds_between_slices_by_hand

joma/scale/step.py
- shape = _long_enough(config, shape)
+ pass
? a text longer than the shape says cannot be planned
@ tests/joma/scale/plan_test.py
@ test_decoding_over_tensor_by_hand

joma/scale/collectives.py
- if key not in found and made.group_size > 1:
+ if made.group_size > 1:
? the last part of an asynchronous exchange stands for its first
@ test_one_channel_is_one_exchange_and_one_device_is_none

joma/scale/collectives.py
- is_once = kind == "permute" or channel is None
+ is_once = channel is None
? a ring's exchanges count once, as they share a channel
@ test_permutes_of_one_channel_are_each_an_exchange

joma/scale/collectives.py
- passes = 2 if self.kind == "all-reduce" else 1
+ passes = 1
? a sum is sent once, though every device gets it
@ test_bytes_by_kind

joma/scale/collectives.py
- kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
+ kind = "all-reduce" if scatters else kind
? a scattered sum counts as one that all devices get
@ test_a_fused_sum_of_which_a_part_stays_is_a_reduce_scatter

joma/scale/work.py
- met += 0 <= at and at % dilate == 0 and at // dilate < size
+ met += 1
? products with padding are taken for work
@ test_padding_is_no_work

joma/scale/work.py
- read[place] = min(read[place], parts)
+ parts = min(read[place], parts)
? a layer of a stack counts as the whole stack
@ test_a_slice_of_a_stack_counts_by_itself

joma/scale/interconnect.py
- links += 2 if spanned == size and self.closes(side) else 1
+ links += 2 if self.closes(side) else 1
? half of a ring is taken for one
@ test_links_of_a_group

joma/scale/estimate.py
- tensor = 2 * sums * stream * share(self.tensor)
+ tensor = sums * stream * share(self.tensor)
? sums over tensor cost half
@ tests/joma/scale/meshes_test.py
@ test_tensor_alone_by_hand

joma/scale/meshes.py
- found, key=lambda one: (not one.fits, one.seconds, one.serial_seconds)
+ found, key=lambda one: (one.seconds, one.serial_seconds)
? a mesh that does not fit may be called the best
@ test_every_mesh_that_divides_is_ranked

joma/scale/step.py
- output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
+ output_bytes=memory.output_size_in_bytes,
? the state counts twice, though it is updated in place
@ tests/joma/scale/plan_test.py
@ test_decoding_over_tensor_by_hand

joma/scale/estimate.py
- return model.num_layers * tokens * heads * passes * (self.seq - 1)
+ return model.num_layers * tokens * heads * passes * self.seq
? keys go round once more than there are others to meet them
@ tests/joma/scale/meshes_test.py
@ test_seq_alone_by_hand

joma/inference/cost/offload.py
- buffered = min(_BUFFERS, k) * weights
+ buffered = 0
? weights that come by have no place
@ test_bytes_and_times_by_hand

joma/inference/cost/offload.py
- batch = min(batch, (room - fixed) // each)
+ batch = min(batch, (room - fixed) // each + 1)
? one sequence more than there is room for
@ test_the_largest_batch_is_the_last_that_fits

joma/scale/curve/scaling.py
- return ratios[max(below) if below else min(ratios)]
+ return ratios[max(ratios)]
? few chips are scaled by the program of many
@ test_rows_that_are_not_compiled_are_scaled_by_those_that_are

joma/scale/program.py
- return -(-(limit - first) // step)
+ return limit - first
? loops that XLA has unrolled count twice, or four times
@ test_loops_run_as_often_as_their_conditions_say

joma/scale/program.py
- if added.opcode != "add":
+ if not added.operands:
? a counter that is multiplied is taken to go up
@ test_loops_run_as_often_as_their_conditions_say
"""
