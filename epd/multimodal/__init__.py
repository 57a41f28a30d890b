"""Multimodal items: what kind of file they come in, how they are cut into patches, and what each patch is called.

Lives in the endpoint, in encode and prefill workers and, for `containers`, `item_identifiers` and `units`, in any
process: these are plain Python, the others import vLLM or torch. Importing this package loads nothing.
"""
