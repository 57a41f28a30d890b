"""The broker: who does what, when.

`core` decides (pure), `policies` are the rules it is given, `daemon` performs what it has decided, `recording` writes
down what it has seen and does it again, `virtual` is time and peers for whoever runs the core without a pipeline.
"""
