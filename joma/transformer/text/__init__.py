"""From text to batches of token ids.

`corpus_text` finds texts, `tokenizer` cuts them, `corpus` holds the ids, and
`batches` draws from them.
"""
