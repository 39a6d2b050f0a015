"""How attention weights follow from logits: `rule`, and `rows` that use it."""
