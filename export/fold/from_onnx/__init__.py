"""ONNX files: into the vocabulary of `graph`, and back with the folds in them.

`file` loads and saves, `survey` says whether there is anything to fold, `constants` and `sizes` what is known before
the network runs, `trial` runs it on made-up inputs, and `compare` holds the written file to the original: all that
without torch. `operators` (with `layers`, `windows` and `movers`) say what each operator means for folding, `read` puts
it together, `write` puts the folds back.
"""
