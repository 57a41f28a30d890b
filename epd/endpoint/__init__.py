"""The endpoint daemon: vLLM's own HTTP API over the pipeline behind the broker.

Lives in the endpoint process. Importing this package loads nothing. vLLM is touched in `engine/`, and in parts of
`http/` and `media/` (`tests/test_layers.py` lists them); everything else here is plain Python. Which names of it, and
where it is patched, is in `docs/vllm.md`.
"""
