"""The endpoint daemon: vLLM's own HTTP API over the pipeline behind the broker.

Lives in the endpoint process. Importing this package loads nothing; `engine_client` and `server` are the
modules that touch vLLM, everything else here is plain Python.
"""
