"""Table 1 of JoMA: do hidden nodes find the latents of a hierarchy?

`config`, `data` (combinations of combinations), `model`, `run` (one run),
`train` (the loop over all of them) and `scores`.
"""
