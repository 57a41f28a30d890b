"""The flight recorder: what the decision core has seen, written down (`recorder`) and done again (`replay`)."""
