"""Asks several questions about the built-in picture at once and prints each answer as it comes.

epd up                              # in another terminal
python examples/client/stream.py

The questions share their picture: its patches are encoded once, and the stories say "cache hit" or "coalesced".
"""

import asyncio
import sys

from epd import AsyncClient
from epd.builtin import demo_image_path

QUESTIONS = ("What is the largest digit?", "How many digits are there?", "What digit is in row 1, column 2?")


async def ask(client: AsyncClient, question: str) -> None:
    async for chunk in client.stream(question, images=[demo_image_path()], max_tokens=16, temperature=0):
        if chunk.text:
            print(f"{question} {chunk.text!r}", flush=True)


async def main(url: str = "http://127.0.0.1:8400") -> None:
    async with AsyncClient(url) as client, asyncio.TaskGroup() as tasks:
        for question in QUESTIONS:
            tasks.create_task(ask(client, question), name=question)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:2]))
