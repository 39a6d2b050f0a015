"""MLPs and projections that compute only the blocks they are told to.

Public modules: api (gather_mlp), heads (project_in, project_out), selection,
reference, xla, pallas_tpu, pallas_gpu, cost, shapes.
"""
