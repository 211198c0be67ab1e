"""ONNX files: into the vocabulary of `graph`, and back with the folds in them.

`file` loads and saves, `survey` says whether there is anything to fold, `constants` and `sizes` what is known before
the network runs, `operators` (with `layers`, `windows` and `movers`) what each operator means for folding, `read` puts
it together, `write` puts the folds back, and `compare` holds the written file to the original. Torch is imported by the
last half of them alone.
"""
