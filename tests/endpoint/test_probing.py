"""What of videos and sounds is refused by their headers, and with which words."""

import itertools
import struct

import numpy as np
import pytest

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import probing
from epd.multimodal import containers
from tests import media_files as files

MP4, WEBM, AVI = files.video(), files.video("webm"), files.video("avi")
GIF = files.picture("gif", count=3)


def refused(check, content, code, **config):
    with pytest.raises(RefusedError) as error:
        check(content, EndpointConfig(**config))
    assert error.value.failure.status == 400 and error.value.failure.code == code, error.value
    return str(error.value)


def flac(claimed_samples):
    """A short FLAC whose header claims another length."""
    content = bytearray(files.audio("flac"))
    content[21] = content[21] & 0xF0 | claimed_samples >> 32
    content[22:26] = (claimed_samples & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(content)


def gif_of(width, height):
    """A film whose header claims another size."""
    return GIF[:6] + struct.pack("<HH", width, height) + GIF[10:]


@pytest.mark.parametrize("kind", files.VIDEO_CODECS)
def test_films_of_the_known_kinds_pass(kind):
    probing.check_video(files.video(kind), EndpointConfig())


def test_an_animated_gif_passes_as_a_film():
    probing.check_video(GIF, EndpointConfig())


@pytest.mark.parametrize("kind", [*files.AUDIO_SUBTYPES, "m4a", "webm"])
def test_sounds_of_the_known_kinds_pass(kind):
    probing.check_audio(files.audio(kind), EndpointConfig())


def test_the_sound_of_a_film_passes():
    probing.check_audio(files.sound_and_film(), EndpointConfig())


def test_mp3_behind_a_tag_is_mp3():
    tag = b"ID3\x04\0\0" + bytes([0, 0, 1, 5]) + b"\0" * 133
    assert containers.kind_of(tag + tag + files.audio("mp3")) == "mp3"


TEXTS = {
    "HLS": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1/a.ts\n#EXT-X-ENDLIST\n",
    "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "DASH": b'<?xml version="1.0"?><MPD profiles="urn:mpeg:dash:profile:isoff-live:2011"></MPD>',
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "random bytes": bytes(range(1, 256)) * 40,
    "a picture": files.picture("png"),
    "text": b"hello " * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("which", TEXTS)
@pytest.mark.parametrize("tag", [b"", b"ID3\x04\0\0" + bytes([0, 0, 0, 10]) + b"\0" * 10], ids=["plain", "tagged"])
def test_no_playlist_and_no_other_file_is_given_to_ffmpeg(which, tag, monkeypatch):
    monkeypatch.setattr(probing.av, "open", None)
    monkeypatch.setattr(probing.soundfile, "SoundFile", None)
    assert "not MP4" in refused(probing.check_video, tag + TEXTS[which], "invalid_video")
    assert "not WAV" in refused(probing.check_audio, tag + TEXTS[which], "invalid_audio")


@pytest.mark.parametrize("content", [MP4, WEBM, AVI], ids=["mp4", "webm", "avi"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_truncated_film_is_refused(content, share):
    refused(probing.check_video, content[: int(len(content) * share)], "invalid_video")


def test_a_container_without_a_film_is_refused():
    assert "no video" in refused(probing.check_video, files.audio("m4a"), "invalid_video")
    assert "no audio" in refused(probing.check_audio, MP4, "invalid_audio")


def test_a_film_without_frames_is_refused():
    refused(probing.check_video, files.video("webm", count=0), "invalid_video")
    refused(probing.check_video, files.video("mp4", count=0), "invalid_video")


def test_a_film_with_huge_frames_is_refused_by_its_header():
    assert "more than" in refused(probing.check_video, gif_of(16_000, 16_000), "invalid_video")
    really = files.video("mp4", count=1, size=(4096, 2400), preset="ultrafast")
    assert "4096 x 2400" in refused(probing.check_video, really, "video_too_large")
    assert "at most 6143" in refused(probing.check_video, MP4, "video_too_large", max_video_pixels=6143)
    probing.check_video(MP4, EndpointConfig(max_video_pixels=6144))


def test_a_film_that_is_too_long_is_refused():
    assert "2.0 s" in refused(probing.check_video, MP4, "video_too_long", max_video_s=1.9)
    probing.check_video(MP4, EndpointConfig(max_video_s=2.0))


def test_frames_are_counted_whatever_the_header_says():
    content = files.video("webm", count=40, fps=1000)
    assert "frames" in refused(probing.check_video, content, "video_too_long", max_video_s=0.5)


def test_the_bound_of_large_frames_is_that_of_the_pixels_to_decode():
    large = files.video("mp4", count=12, fps=24, size=(2560, 1440), preset="ultrafast")
    probing.check_video(large, EndpointConfig(max_video_s=1))
    refused(probing.check_video, large, "video_too_long", max_video_s=0.6)


@pytest.mark.parametrize(("length", "fits"), [(64, True), (65, False)])
def test_as_many_frames_as_are_allowed(length, fits):
    config = EndpointConfig(max_video_frames=64)
    if fits:
        probing.check_sampled(1920, 1080, length, config)
    else:
        with pytest.raises(RefusedError, match="more than 64 frames"):
            probing.check_sampled(1920, 1080, length, config)


def test_sampled_frames_must_fit_the_memory_they_may_take():
    with pytest.raises(RefusedError, match="bytes"):
        probing.check_sampled(1920, 1080, 64, EndpointConfig(max_decoded_bytes=64 * 1920 * 1080 * 3 - 1))


def jpeg(parts):
    return files.jpeg_frames(parts).partition(",")[2]


def test_frames_that_come_as_pictures():
    config = EndpointConfig(max_video_frames=4)
    probing.check_frames(jpeg(4), config)
    for data, code in (
        (jpeg(5), "too_many_frames"),
        ("", "invalid_image"),
        ("AAAA", "invalid_image"),
        (jpeg(1) + ",???", "invalid_video"),
        (jpeg(1) + "," + files.jpeg_frames(1, size=(32, 32)).partition(",")[2], "invalid_video"),
    ):
        with pytest.raises(RefusedError) as error:
            probing.check_frames(data, config)
        assert error.value.failure.code == code


def test_sound_of_no_length_is_refused():
    silent = files.sound_file(np.zeros(0, np.float32), "WAV", "PCM_16")
    assert "zero" in refused(probing.check_audio, silent, "invalid_audio")
    half = files.audio("ogg")
    refused(probing.check_audio, half[: len(half) // 2], "invalid_audio")


def test_sound_that_is_too_long_is_refused_by_its_header():
    assert "1.0 s" in refused(probing.check_audio, files.audio(), "audio_too_long", max_audio_s=0.9)
    assert "7200.0 s" in refused(probing.check_audio, flac(7200 * files.RATE), "audio_too_long")
    refused(probing.check_audio, files.audio("m4a", 3), "audio_too_long", max_audio_s=2)


def test_a_wav_that_claims_hours_and_is_cut_off_is_refused():
    assert "truncated" in refused(probing.check_audio, files.wav_header(5 * 3600), "invalid_audio")
    half = files.audio("wav")
    assert "truncated" in refused(probing.check_audio, half[: len(half) // 2], "invalid_audio")


@pytest.mark.parametrize("size", [0x7FFF_FFFF, 0xFFFF_FFFF])
def test_a_wav_that_was_streamed_and_does_not_know_its_length_passes(size):
    content = bytearray(files.audio("wav"))
    at = content.index(b"data") + 4
    content[at : at + 4] = size.to_bytes(4, "little")
    content[4:8] = size.to_bytes(4, "little")
    probing.check_audio(bytes(content), EndpointConfig())


@pytest.mark.parametrize("rate", [0, 1, 999, 2_000_000_000])
def test_an_absurd_rate_is_refused(rate):
    refused(probing.check_audio, files.wav_header(0.0001, rate=rate), "invalid_audio")


def test_too_many_channels_are_refused():
    refused(probing.check_audio, files.audio("wav", channels=17), "invalid_audio")
    probing.check_audio(files.audio("wav", channels=16), EndpointConfig())


def test_sound_must_fit_the_memory_it_may_take():
    stereo = files.audio("wav", channels=2)
    refused(probing.check_audio, stereo, "audio_too_large", max_decoded_bytes=8 * files.RATE - 1)
    probing.check_audio(stereo, EndpointConfig(max_decoded_bytes=8 * files.RATE))


@pytest.mark.parametrize("content", [MP4, WEBM, AVI, files.audio("m4a")], ids=["mp4", "webm", "avi", "m4a"])
def test_damaged_files_pass_or_are_refused_and_nothing_else_happens(content):
    random = np.random.default_rng(0)
    config = EndpointConfig()
    for check, _ in itertools.product((probing.check_video, probing.check_audio), range(150)):
        damaged = bytearray(content)
        for at in random.integers(0, len(content), 8):
            damaged[at] = random.integers(0, 256)
        try:
            check(bytes(damaged), config)
        except RefusedError as error:
            assert error.failure.status == 400 and error.failure.message
