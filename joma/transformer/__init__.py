"""The multi-layer Transformer, on real text and real checkpoints.

The model:

  config            its shape, one dataclass for every family; rope_config
  model             tokens to logits, in Linen; attention, mlp, norm
  rope, rope_bounds rotary positions and how far interpolation errs
  full_cache        the KV cache that keeps everything

Text, training, measurements:

  corpus            texts and their tokens; corpus_text, tokenizer
  batches           batches as functions of the step
  train             train_and_evaluate, the training loop; lm_config, lm_step,
                    init, optimizer, layouts, sharding
  probes            attention entropy, sinks, support, stable rank; inspection
  rope_extension    reading beyond the window of training

Checkpoints:

  pretrained        Hugging Face folders to parameters and back; hf_config,
                    hf_fields, hf_families, hf_tensors, safetensors_folder
"""
