"""Arithmetic about memory: weights, activations, KV and batches of each stage, before anything is started.

Pure but for `weights`, which builds the model without memory to count its parameters.
"""
