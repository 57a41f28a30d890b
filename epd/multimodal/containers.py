"""What kind of file some bytes are, by how they begin, and whether the file is complete.

Pure, no decoder. Only kinds known here are ever given to FFmpeg: among the formats that it recognises by itself are
playlists (HLS, DASH, concat, SDP), which are text and name more files and addresses for it to open. A file that begins
like one of the kinds here cannot be a playlist.
"""

from __future__ import annotations

VIDEO = ("mp4", "matroska", "avi", "gif")
AUDIO = ("wav", "flac", "mp3", "aac", "amr", "ogg", "aiff", "au", "caf", "mp4", "matroska", "avi")
# FFmpeg extracts the audio from these; libsndfile reads the others.
BY_FFMPEG = frozenset({"mp4", "matroska", "avi", "aac", "amr"})

_MAX_TAGS, _MAX_BOXES = 8, 100_000
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"pnot")
# A WAV that was written to a pipe claims one of these largest sizes.
_STREAMED_WAV = 0x7FFF_0000
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_STARTS = (
    (b"fLaC", "flac"),
    (b"OggS", "ogg"),
    (b".snd", "au"),
    (b"caff", "caf"),
    (b"#!AMR\n", "amr"),
    (b"#!AMR-WB\n", "amr"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (_EBML, "matroska"),
)
_RIFF = {b"WAVE": "wav", b"AVI ": "avi"}
# What else people send, for messages: how it begins, and at which byte.
_NAMES = (
    (0, b"%PDF", "PDF"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML or SVG"),
    (0, b"<!DOCTYPE", "HTML"),
    (0, b"<html", "HTML"),
    (0, b"8BPS", "PSD"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (0, b"qoif", "QOI"),
    (0, b"DDS ", "DDS"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x30\x26\xb2\x75", "ASF (WMA, WMV)"),
    (0, b"FLV\x01", "FLV"),
    (0, b"\x00\x00\x01\xba", "MPEG-PS"),
    (0, b"#EXTM3U", "a playlist"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypavif", "AVIF"),
)
_PNG = b"\x89PNG\r\n\x1a\n"


def kind_of(content: bytes) -> str:
    """The kind of file: one of `VIDEO` and `AUDIO`, or "" for anything else.

    ID3 tags at the start are skipped, as decoders do: what follows them counts.
    """
    start = _after_tags(content)
    head = content[start : start + 12]
    for magic, kind in _STARTS:
        if head.startswith(magic):
            return kind
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] in _RIFF:
        return _RIFF[head[8:12]]
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in _MP4_FIRST:
        return "mp4"
    if _is_mpeg_audio(head):
        return "mp3"
    if _is_aac(content, start):
        return "aac"
    return ""


def name_of(content: bytes) -> str:
    """The name, for messages, of a file that begins like this; "" if it is unknown."""
    for at, magic, name in _NAMES:
        if content[at : at + len(magic)] == magic:
            return name
    kind = kind_of(content)
    return {"mp4": "MP4", "matroska": "Matroska", "ogg": "Ogg"}.get(kind, kind.upper())


def icon_sizes(content: bytes) -> list[tuple[int, int]]:
    """The (width, height) of each picture in a Windows icon, as the pictures say themselves; none for other files.

    The icon's own table cannot be trusted: it has only a byte for each.
    """
    if content[:4] != b"\0\0\1\0":
        return []
    sizes = []
    for i in range(min(int.from_bytes(content[4:6], "little"), len(content) // 16)):
        at = int.from_bytes(content[18 + 16 * i : 22 + 16 * i], "little")
        head = content[at : at + 24]
        if head.startswith(_PNG):
            sizes.append((int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")))
        else:  # its height counts the mask, too
            width, height = (int.from_bytes(head[k : k + 4], "little", signed=True) for k in (4, 8))
            sizes.append((abs(width), abs(height) // 2))
    return sizes


def is_truncated(kind: str, content: bytes) -> bool:
    """Whether a container says that it is longer than it is; false for kinds that do not say.

    A WAV may lack a tenth: such headers are often slightly wrong.
    """
    if kind == "mp4":
        return _mp4_is_truncated(content)
    if kind == "matroska":
        return _matroska_is_truncated(content)
    if kind == "avi":
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    if kind == "wav":
        return _wav_is_truncated(content)
    return False


def _after_tags(content: bytes) -> int:
    start = 0
    for _ in range(_MAX_TAGS):
        head = content[start : start + 10]
        if len(head) < 10 or not head.startswith(b"ID3"):
            break
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte & 0x7F
        start += 10 + size + (10 if head[5] & 0x10 else 0)
    return start


def _is_mpeg_audio(head: bytes) -> bool:
    """Whether a frame of MPEG audio, layer 1 to 3, begins here."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer, rate, sampling = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer != 0 and rate != 15 and sampling != 3


def _is_aac(content: bytes, start: int) -> bool:
    """Whether two consecutive frames of AAC (ADTS) begin here: the first bytes alone are too common."""
    at = start
    for _ in range(2):
        head = content[at : at + 6]
        if len(head) < 6 or head[0] != 0xFF or head[1] & 0xF6 != 0xF0 or head[2] >> 2 & 15 > 12:
            return at > start and at == len(content)  # one whole frame
        size = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        if size < 7:
            return False
        at += size
    return True


def _wav_is_truncated(content: bytes) -> bool:
    at = 12
    for _ in range(_MAX_BOXES):
        if at + 8 > len(content):
            return False
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"data":
            there = len(content) - at - 8
            return size < _STREAMED_WAV and size - there > size // 10
        at += 8 + size + size % 2
    return False


def _mp4_is_truncated(content: bytes) -> bool:
    at = 0
    for _ in range(_MAX_BOXES):
        if at == len(content):
            return False
        size = int.from_bytes(content[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(content[at + 8 : at + 16], "big")
        elif size == 0:  # to the end of the file
            return False
        if size < 8 or at + size > len(content):
            return True
        at += size
    return True


def _matroska_is_truncated(content: bytes) -> bool:
    header = _ebml_size(content, len(_EBML))
    if header is None:
        return True
    at = header[1] + header[0]
    while content[at : at + 1] == b"\xec":  # a void element
        void = _ebml_size(content, at + 1)
        if void is None:
            return True
        at = void[1] + void[0]
    if content[at : at + 4] != _SEGMENT:
        return True
    segment = _ebml_size(content, at + 4)
    if segment is None:
        return True
    size, start = segment
    return size != -1 and start + size > len(content)


def _ebml_size(content: bytes, at: int) -> tuple[int, int] | None:
    """An element's size (-1 if it is not given) and where its data begin."""
    if at >= len(content) or content[at] == 0:
        return None
    length = 9 - content[at].bit_length()
    if at + length > len(content):
        return None
    value = int.from_bytes(content[at : at + length], "big") & ((1 << 7 * length) - 1)
    return (-1 if value == (1 << 7 * length) - 1 else value), at + length
