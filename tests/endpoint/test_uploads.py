"""What is kept of uploaded pictures, in virtual time; and the bounded collections it is made of."""

import pytest

from epd.config import EndpointConfig
from epd.endpoint.media.stored_picture import StoredPicture
from epd.messages import DropUpload, Patch, Upload, Uploaded
from epd.process.bounded import Beliefs, ByteCache

pytestmark = pytest.mark.engine


class Pipeline:
    """A store with its clock and all that it sent."""

    def __init__(self, **config):
        from epd.endpoint.media.uploads import Uploads

        self.now, self.sent, self.full = 100.0, [], False
        self.beliefs = Beliefs()
        options = {"media_ttl_s": 10.0, "media_max_per_key": 2, "media_bytes": 1000} | config
        self.uploads = Uploads(EndpointConfig(**options), self.beliefs, self.send, lambda: self.now)

    def send(self, message, frames=()):
        self.sent.append((message, list(frames)))
        return not self.full

    def add(self, *names, owner="a", num_bytes=100):
        from epd.multimodal.splitter import Split

        kept = StoredPicture(b"x" * 10)
        kept.item_bytes = num_bytes - 10
        patches = [Patch(patch_hash=name, modality="image", num_tokens=4, num_frames=1) for name in names]
        with self.uploads.room(owner):
            return self.uploads.add(owner, kept, Split(patches, [], [name.encode() for name in names]))

    def answer(self, media, code=""):
        self.uploads.on_uploaded(Uploaded(upload_id=media.upload_id, code=code, message="why"))

    def refused(self, **options):
        from epd.endpoint.engine.submission import PipelineError

        with pytest.raises(PipelineError) as caught:
            self.add("n", **options)
        return caught.value.failure


def test_a_picture_lives_for_its_time_and_is_its_owners_only():
    pipeline = Pipeline()
    media = pipeline.add("p", "q")
    ((upload, frames),) = pipeline.sent
    assert isinstance(upload, Upload) and upload.ttl_s == 10.0 and frames == [b"p", b"q"]
    assert pipeline.uploads.find(media.id, "a") is media
    assert pipeline.uploads.find(media.id, "b") is None and pipeline.uploads.find("other", "a") is None
    pipeline.now += 9.9
    assert pipeline.uploads.find(media.id, "a") is media
    pipeline.now += 0.1
    assert pipeline.uploads.find(media.id, "a") is None, "before any sweep"
    pipeline.uploads.sweep()
    assert not len(pipeline.uploads) and pipeline.uploads.num_bytes == 0 and len(pipeline.sent) == 1
    pipeline.answer(media)
    assert not len(pipeline.beliefs), "an answer that comes too late"


def test_beliefs_live_as_long_as_one_upload_with_the_patch():
    pipeline = Pipeline()
    first = pipeline.add("p", "q")
    assert "p" not in pipeline.beliefs
    pipeline.answer(first)
    assert "p" in pipeline.beliefs and "q" in pipeline.beliefs
    pipeline.now += 5
    second = pipeline.add("q", "r")
    assert pipeline.sent[-1][1] == [b"r"]
    pipeline.answer(second)
    pipeline.now += 5
    pipeline.uploads.sweep()
    assert "p" not in pipeline.beliefs and "q" in pipeline.beliefs


def test_pixels_that_are_needed_are_sent_once():
    pipeline = Pipeline()
    pipeline.beliefs.add(["p"])
    media = pipeline.add("p", "q")
    pipeline.answer(media, "pixels_needed")
    assert [frames for _, frames in pipeline.sent] == [[b"q"], [b"p", b"q"]]
    pipeline.answer(media, "pixels_needed")
    assert len(pipeline.sent) == 2 and media.state == "failed"


def test_quotas_by_number_and_bytes():
    pipeline = Pipeline()
    first = pipeline.add("p")
    pipeline.now += 4
    pipeline.add("q")
    failure = pipeline.refused()
    assert (failure.status, failure.code, failure.retry_after_s) == (429, "media_quota", 6)
    pipeline.add("q", owner="b", num_bytes=700)
    assert pipeline.refused(owner="c", num_bytes=101).status == 429
    assert pipeline.refused(owner="c", num_bytes=1001).status == 413
    pipeline.uploads.drop(first)
    assert isinstance(pipeline.sent[-1][0], DropUpload)
    pipeline.add("r")
    with pipeline.uploads.room("c"), pipeline.uploads.room("c"):
        assert pipeline.refused(owner="c").status == 429, "those that are on their way count"
    with pipeline.uploads.room("c"):
        pass


def test_failures_that_may_pass_are_tried_again_later_and_later():
    pipeline = Pipeline(media_ttl_s=100.0)
    media = pipeline.add("p")
    times = []
    for _ in range(8):
        pipeline.answer(media, "not_ready")
        assert media.state == "failed" and media.reason == "not_ready: why"
        count, before = len(pipeline.sent), pipeline.now
        while len(pipeline.sent) == count and pipeline.now < before + 40:
            pipeline.now += 0.5
            pipeline.uploads.sweep()
        times.append(pipeline.now - before)
        if not len(pipeline.uploads):
            break
    assert times[:6] == [1, 2, 4, 8, 16, 30]
    assert not len(pipeline.uploads)


def test_failures_that_stay_are_not_tried_again():
    pipeline = Pipeline()
    media = pipeline.add("p")
    pipeline.answer(media, "overloaded")
    pipeline.now += 9
    pipeline.uploads.sweep()
    assert media.state == "failed" and len(pipeline.sent) == 1
    pipeline.full = True
    assert pipeline.add("q").reason.startswith("overloaded")


def test_a_new_broker_is_told_of_what_lives():
    pipeline = Pipeline()
    first = pipeline.add("p")
    pipeline.now += 5
    second = pipeline.add("q")
    pipeline.answer(second)
    pipeline.beliefs.clear()
    pipeline.uploads.on_lost()
    assert second.state == "encoding"
    pipeline.now += 6
    pipeline.sent.clear()
    pipeline.uploads.send_all()
    ((upload, frames),) = pipeline.sent
    assert (upload.upload_id, upload.ttl_s, frames) == (second.upload_id, 4.0, [b"q"])
    assert pipeline.uploads.find(first.id, "a") is None


def test_a_byte_cache_lets_go_of_what_was_used_least_recently():
    cache = ByteCache(10)
    cache.put("a", 1, 4)
    cache.put("b", 2, 4)
    assert cache.get("a") == 1
    cache.put("c", 3, 4)
    assert cache.get("b") is None and cache.get("a") == 1 and cache.num_bytes == 8
    cache.put("a", 4, 11)
    assert cache.get("a") is None and cache.num_bytes == 4, "too large, and the old value is gone"
    cache.put("c", 5, 10)
    assert cache.get("c") == 5 and len(cache) == 1 and cache.num_bytes == 10


def test_beliefs_are_bounded():
    beliefs = Beliefs(keep=2)
    beliefs.add(["a", "b"])
    beliefs.add(["a", "c"])
    assert "b" not in beliefs and "a" in beliefs and "c" in beliefs
    beliefs.forget(["a", "x"])
    assert "a" not in beliefs and len(beliefs) == 1
    beliefs.clear()
    assert not len(beliefs)
