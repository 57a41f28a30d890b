"""The endpoint daemon: vLLM's own HTTP API over the pipeline behind the broker.

Lives in the endpoint process. Importing this package loads nothing. vLLM is touched in `engine/` and in `http/server`,
`http/options`, `media/decoding`, `media/processor_cache`, `media/repeats` and `media/routes`; everything else here is
plain Python. It is patched in three places: `engine/llm` (a name of a module, while `AsyncLLM` is made),
`media/processor_cache` and `media/repeats` (methods of its renderer and its processor).
"""
