"""Rotary positions: `config`, `rotary`, `bounds`, and the study `extension`."""
