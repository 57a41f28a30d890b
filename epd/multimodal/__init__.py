"""Multimodal items as patches: how they are cut, and what each piece is called.

Importing this package loads nothing; its modules import vLLM.
"""
