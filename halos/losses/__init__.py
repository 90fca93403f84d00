"""The losses: one pure function a file, named in config/loss/*.yaml. Tensors are positional, hyperparameters keyword-only.

The signature decides the rest. The type of the first parameter chooses the trainer, a parameter `reference` asks for a
reference model, `statistics` for the module's function of that name over the whole global batch, and the keyword-only
names are the loss's legal YAML keys. `Annotated[float, Range(...)]` bounds a key. A loss chooses its denominator, items or
scored tokens of the global batch, by `per` of the `Loss` that it returns.
"""
