"""KV caches of a fixed number of slots.

`policy` is the contract of what a policy decides, `kv_cache` the cache,
`prompts` and `slot_step` what it does with prompts and with single tokens.
"""
