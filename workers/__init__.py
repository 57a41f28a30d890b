"""Stage workers: each has one vLLM engine in a thread, beside an event loop with one link to the broker.

Lives in worker processes.
"""
