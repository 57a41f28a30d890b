"""How messages travel between EPD's processes: frames, ZeroMQ sockets and a peer's link to the broker.

Lives in every process.
"""
