"""Every statement of Scan & Snap (https://arxiv.org/abs/2305.16380), measured.

`table` lists the statements with their bounds; `attention` and `decoder`
measure them, one function each, against the `oracles`.
"""
