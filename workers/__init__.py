"""Stage workers: one vLLM engine in a thread each, beside an event loop with one link to the broker."""
