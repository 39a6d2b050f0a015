"""Many layers: joint MLP and attention dynamics (JoMA).

https://arxiv.org/abs/2310.00535. No public module yet.
"""
