"""MLPs and projections that compute only the blocks they are told to.

Public modules: api (gather_mlp), heads (project_in, project_out), selection,
reference, xla, cost, shapes; the packages tpu and gpu have the kernels.

Letters: B batch, D width, F neurons, S chosen blocks or heads of a list, U
blocks or heads of the plan; N heads, H head size.
"""
