"""What a step of training or decoding costs on many chips, before it runs.

Public modules: plan_config, shapes, program, collectives, work, interconnect,
estimate, meshes, step, plan, report. A step is compiled ahead of time for a
topology that is not there, and its bytes, FLOPs and collectives are read from
the compiled program.
"""
