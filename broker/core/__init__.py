"""The decision core: messages in, messages out. Pure: no sockets, no clocks, no asyncio.

`core.Core` is its door. A request's state and every legal change of it is in `request`, its way through the parts in
`admission`, `legs`, `encoding`, `answers` and `endings`; `retry`, `liveness` and `membership` are for what goes wrong.
"""
