"""The shared multimodal cache: index, pools, the cache daemon and the vLLM EC connector."""
