"""HTTP at the endpoint: vLLM's app behind our server, what is refused, and how clients are told of failures.

Lives in the endpoint process.
"""
