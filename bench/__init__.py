"""Measures a bundle's files on the runtimes that this machine has, and proves that they compute the right thing.

Owns backends, measuring, parity, results, reports and the `bench` command. Knows nothing of the data set, of folding,
or of how the model was trained: all it sees is the bundle (`export.bundle`).
"""
