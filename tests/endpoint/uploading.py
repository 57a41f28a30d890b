"""Pictures that nobody has seen before, and how to upload them; what the fake broker was sent of them."""

import io
import json

import numpy
from PIL import Image

from .serving import until, with_picture

KEYS = ["first", "second"]
_serial = iter(range(1, 255))


def picture(size=(200, 120), kind="PNG"):
    """A file that nobody has seen before."""
    pixels = numpy.full((size[1], size[0], 3), next(_serial), dtype="uint8")
    pixels[5:50, 7:90] = numpy.random.default_rng(next(_serial)).integers(0, 255, (45, 83, 3), dtype="uint8")
    return through(Image.fromarray(pixels), kind)


def through(image, kind):
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def key(which):
    return {"headers": {"Authorization": f"Bearer {KEYS[which]}"}}


async def upload(served, file, status=200, query="", **options):
    before = len(served.broker.uploads)
    async with served.session.post("/v1/media" + query, data=file, **options) as answer:
        body = await answer.json()
        assert answer.status == status, body
        if status == 200:
            served.kept.append((body["id"], options))
            await until(lambda: len(served.broker.uploads) > before)
        return body if status == 200 else (answer, body["error"])


async def state(served, media_id, wanted):
    async def check():
        return json.loads((await served.get(f"/v1/media/{media_id}"))[1])["state"] == wanted

    await until(check)


def media(media_id, text="Read the grid."):
    return with_picture(text, url=f"epd-media://{media_id}")


def names(message):
    return [patch.patch_hash for patch in message.patches]


def pixel_frames_asked(submit):
    return sum(patch.num_frames for patch in submit.patches)


def pixel_frames(broker, submit):
    return [bytes(frame) for frame in broker.frames[submit.request_id][submit.num_engine_frames :]]
