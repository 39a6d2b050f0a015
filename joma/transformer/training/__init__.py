"""Training of language models.

`train` is the loop, `lm_config` its settings, `lm_step` its steps; `init` and
`optimizer` make what the steps update, and `layouts` lays a run on devices.
"""
