"""MLPs of which each token reads a part, gated ones (SwiGLU) above all.

`methods` says what is read and what comes out; `router` puts a method into a
model; `calibration` finds thresholds and low-rank parts on texts, `allocation`
shares a budget out over layers and matrices, `error_training` trains choosers
on the error of an MLP's output.
"""
