"""Speculative decoding: what a cheap draft guesses, one pass verifies.

draft_config  what drafts there are, by the names of flags
drafts        the drafts: n-grams of the text so far, a smaller model
folder        a draft's model as it lies on a disk
rule          which guesses stay, so that tokens are the model's own
round         what is between two rounds
rounds        the programs of a round: guess, verify and keep
streaming     prompts to tokens, one by one
"""
