"""What the theory's sparsity buys at inference.

sampling          the next token from logits
generate          prompts to continuations: prefill, then decode steps
"""
