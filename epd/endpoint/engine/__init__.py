"""The pipeline as vLLM's engine core: requests to the broker, and their outputs back, each exactly once.

Lives in the endpoint process.
"""
