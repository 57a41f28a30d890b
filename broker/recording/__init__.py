"""The flight recorder: what the decision core has seen, written down (`recorder`) and replayed (`replay`).

Lives in the broker daemon (`recorder`) and in the user's process (`replay`).
"""
