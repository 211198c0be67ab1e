"""Where a model to export comes from, with the inputs that it is held to."""
