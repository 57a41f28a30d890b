"""Calls an ASGI application in memory."""

import json


class Answer:
    """What the application sent: `status`, `headers`, the `chunks` and whether the body `ended`."""

    def __init__(self):
        self.status, self.headers, self.chunks, self.ended = 0, {}, [], False

    async def send(self, message):
        if message["type"] == "http.response.start":
            assert not self.status
            self.status = message["status"]
            self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            assert self.status and not self.ended
            self.chunks.append(bytes(message["body"]))
            self.ended = not message.get("more_body", False)

    @property
    def body(self):
        return b"".join(self.chunks)

    @property
    def error(self):
        return json.loads(self.body)["error"]


async def call(app, path="/v1/chat/completions", method="POST", body=b"", headers=()):
    """Runs `app` once; the body comes in two chunks."""
    half = len(body) // 2
    messages = [{"type": "http.request", "body": body[:half], "more_body": True}]
    messages += [{"type": "http.request", "body": body[half:], "more_body": False}]
    answer = Answer()

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await app(scope, receive, answer.send)
    return answer
