"""What is read out of a model's residual stream, beside its logits.

pooling   one vector of unit length for a text
"""
