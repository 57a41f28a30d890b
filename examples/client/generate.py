"""Asks a running pipeline one question about the built-in picture and prints the answer.

epd up                              # in another terminal
python examples/client/generate.py
"""

import sys

from epd import APIError, Client, TransportError
from epd.builtin import DEMO_QUESTION, demo_image_path


def main(url: str = "http://127.0.0.1:8400") -> int:
    with Client(url) as client:
        try:
            answer = client.generate(DEMO_QUESTION, images=[demo_image_path()], max_tokens=32, temperature=0)
        except (APIError, TransportError) as error:  # refused or failed with a reason, or no answer at all
            print(error, file=sys.stderr)
            return 1
    print(answer.text.strip())
    print(answer.request_id, answer.finish_reason, answer.usage, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
