"""Quality against weights read, under every rule of leaving out.

`capture` writes what a model's layers read, `predictor_training` and
`training_free` learn from it, and `contextual_study` holds the rules against
each other on the model of `contextual_subject`, by `contextual_bench`.
"""
