"""The article's network, its data and its recipes: from MNIST to a checkpoint that others can load.

Owns the network, the data set, the recipes, the training loop, the checkpoint and the figures. Knows neither ONNX nor
any runtime that a model may be deployed on. Importing this package imports no torch.
"""
