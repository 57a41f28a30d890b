"""Multimodal items: what kind of file they come in, how they are cut into patches, and what each patch is called.

Importing this package loads nothing. `containers`, `item_identifiers` and `units` are plain Python, also for the client
and the command line; all others import vLLM or torch.
"""
