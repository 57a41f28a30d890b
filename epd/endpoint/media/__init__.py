"""Media at the endpoint: their headers, their decoders, vLLM's processor and its cache, and uploaded pictures.

Lives in the endpoint process.
"""
