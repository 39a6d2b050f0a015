"""Hugging Face folders, to a TransformerConfig and a parameter tree and back.

`pretrained` loads and saves; `config_json`, `families` and `fields` read
config.json, `tensors` and `safetensors_folder` the weights; `hub` downloads a
folder by its name.
"""
