"""The shared multimodal cache: index, pools, the cache daemon and the vLLM EC connector.

Lives in the broker (the index), in the cache daemon (pools) and in the workers (views of pools, the connector).
"""
