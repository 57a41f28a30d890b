"""Frames and samples are vLLM's own; what the decoders find is held against the limits again."""

import numpy as np
import pytest

from epd.config import EndpointConfig
from tests import media_files as files

pytestmark = pytest.mark.engine


def video_io(num_frames=8, limits=None, **kwargs):
    from vllm.multimodal.media.image import ImageMediaIO

    from epd.endpoint.media.decoding import VideoIO

    return VideoIO(ImageMediaIO(), limits or EndpointConfig(), num_frames=num_frames, **kwargs)


def audio_io(**limits):
    from epd.endpoint.media.decoding import AudioIO

    return AudioIO(EndpointConfig(**limits))


def refused(call, code):
    from epd.endpoint.http.refusals import RefusedError

    with pytest.raises(RefusedError) as error:
        call()
    assert error.value.failure.code == code and error.value.failure.status in (400, 413), error.value
    return str(error.value)


@pytest.mark.parametrize("kind", files.VIDEO_CODECS)
@pytest.mark.parametrize("backend", ["opencv", "qwen2_vl", "qwen3_vl"])
def test_frames_are_those_of_vllm(kind, backend, tmp_path):
    from vllm.multimodal.media.image import ImageMediaIO
    from vllm.multimodal.media.video import VideoMediaIO

    content = files.video(kind, count=30, seed=3)
    frames, facts = VideoMediaIO(ImageMediaIO(), num_frames=8, video_backend=backend).load_bytes(content).media
    ours = video_io(video_backend=backend)
    (tmp_path / "film").write_bytes(content)
    for found in (ours.load_bytes(content), ours.load_file(tmp_path / "film")):
        assert np.array_equal(found.media[0], frames) and found.media[1] == facts


@pytest.mark.parametrize("kind", [*files.AUDIO_SUBTYPES, "m4a", "webm"])
def test_samples_are_those_of_vllm(kind, tmp_path):
    from vllm.multimodal.media.audio import AudioMediaIO

    content = files.audio(kind, seed=3)
    samples, rate = AudioMediaIO().load_bytes(content)
    (tmp_path / "sound").write_bytes(content)
    for found, found_rate in (audio_io().load_bytes(content), audio_io().load_file(tmp_path / "sound")):
        assert np.array_equal(found, samples) and found_rate == rate


def test_the_decoder_is_stopped_before_it_takes_room_for_too_many_frames(monkeypatch):
    from epd.endpoint.media import probing

    content = files.video(count=20)
    monkeypatch.setattr(probing, "check_video", lambda *_: None)  # as if the header had told something else
    for limits, code in (
        (EndpointConfig(max_video_frames=7), "too_many_frames"),
        (EndpointConfig(max_video_s=1.0), "video_too_long"),
        (EndpointConfig(max_video_pixels=6000), "video_too_large"),
        (EndpointConfig(max_decoded_bytes=8 * 96 * 64 * 3 - 1), "video_too_large"),
    ):
        refused(lambda limits=limits: video_io(limits=limits).load_bytes(content), code)
    fits = EndpointConfig(max_video_frames=8, max_video_pixels=96 * 64, max_decoded_bytes=8 * 96 * 64 * 3)
    assert len(video_io(limits=fits).load_bytes(content).media[0]) == 8


def test_a_sound_that_is_longer_than_its_header_says_is_stopped(monkeypatch):
    from epd.endpoint.media import probing

    monkeypatch.setattr(probing, "check_audio", lambda *_: None)
    for kind in ("wav", "m4a"):
        content = files.audio(kind, 2.0)
        assert "duration" in refused(
            lambda content=content: audio_io(max_audio_s=1).load_bytes(content), "invalid_audio"
        )
        small = audio_io(max_decoded_bytes=1000)
        refused(lambda content=content, small=small: small.load_bytes(content), "invalid_audio")


def test_a_film_whose_length_nobody_knows_is_refused(monkeypatch):
    from epd.endpoint.media import probing

    live = files.video("webm", live=True)
    assert "does not say how long" in refused(lambda: video_io().load_bytes(live), "invalid_video")
    monkeypatch.setattr(probing, "check_video", lambda *_: None)
    assert "does not say how long" in refused(lambda: video_io().load_bytes(live), "invalid_video")


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    (tmp_path / "film").write_bytes(files.video())
    small = EndpointConfig(max_body_bytes=1000)
    refused(lambda: video_io(limits=small).load_file(tmp_path / "film"), "body_too_large")
    assert video_io(limits=small).get_max_bytes() == 1000
