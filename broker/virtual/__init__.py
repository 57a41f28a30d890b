"""A whole pipeline in virtual time: the real decision core, and message-level peers that take as long as costs say.

Lives in whatever process runs it: tests, benchmarks, and later the simulator and the planner. Nothing here reads a wall
clock or draws a random number, so the same input gives the same messages, byte for byte.

`clock` is the time, `process` what can be killed and can hang, `network` carries messages, `link` is a peer's side of
its registration, `broker` runs the core; `endpoint`, `encode`, `prefill` and `decode` are the peers, `costs` says how
long things take, and `simulation` puts everything together.
"""
