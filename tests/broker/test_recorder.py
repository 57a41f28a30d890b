"""The flight recorder and the replay of what it has written."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from structlog.testing import capture_logs

from broker.recording.recorder import Recorder
from broker.recording.replay import RecordingError, replay
from epd import messages as m
from epd.cli import main
from epd.config import BrokerConfig
from tests.broker.recorded import RecordedCore
from tests.broker.world import World, step


def recorded(folder: Path, **options: int) -> World:
    """A pipeline that loses a worker in the middle of a request, fails another and finishes a third."""
    world = World()
    core = RecordedCore(world.config, folder, **options)
    world.core = core
    world.pipeline(prefill=2, decode=2)
    world.submit("r1", ["a", "b"], prefill_samples=True, resumable=True)
    world.submit("r2", ["b", "c"])
    world.encode_all()
    world.say(
        world.core.requests["r2"].leg.prefill.peer_id, m.LegFailed(leg_id="r2", code="engine_failed", message="no")
    )
    world.say(world.core.requests["r1"].leg.prefill.peer_id, m.Prefilled(leg_id="r1", token_ids=[5]), [b"token"])
    world.say(world.core.requests["r1"].leg.decode.peer_id, m.Goodbye(reason="killed"))
    world.wait(1.0)
    request = world.core.requests["r1"]
    assert request.leg.leg_id != "r1"
    world.say(request.leg.prefill.peer_id, m.Prefilled(leg_id=request.leg.leg_id, token_ids=[6]), [b"token"])
    done = step(request.leg.leg_id, token_ids=[7], finish_reason="stop", num_before=2)
    world.say(request.leg.decode.peer_id, done, [b"last"])
    world.submit("r3")
    return world


def recording(folder: Path) -> Path:
    [file] = folder.glob("broker-*.mpk")
    return file


def test_a_replay_ends_as_the_broker_did_and_sends_the_same(tmp_path: Path) -> None:
    world = recorded(tmp_path)
    done = world.core.replayed()
    assert (done.first_difference, done.errors) == (0, [])
    assert (done.num_messages, done.num_ticks) == (world.core.num_messages, 4)
    assert done.core.counters() == world.core.counters()
    assert done.core.stories.story("r1") == world.core.stories.story("r1")
    assert done.failures == {"engine_failed": 1}
    assert list(done.core.requests) == ["r3"]
    assert done.seconds == 1.0


def test_a_replay_says_from_where_on_it_differs(tmp_path: Path) -> None:
    world = recorded(tmp_path)
    world.core.recorder.close()
    records = list(msgpack.Unpacker(io.BytesIO(recording(tmp_path).read_bytes())))
    [at] = [number for number, one in enumerate(records) if number and one[1] == world.endpoint and b"r2" in one[3]]
    records[at][3] = records[at][3].replace(b"r2", b"R2")
    done = replay(io.BytesIO(b"".join(map(msgpack.packb, records))))
    assert done.first_difference == at


def test_a_recording_that_ends_in_the_middle_is_replayed_up_to_there(tmp_path: Path) -> None:
    world = recorded(tmp_path)
    whole = world.core.replayed()
    data = recording(tmp_path).read_bytes()
    done = replay(io.BytesIO(data[:-5]))
    assert (done.num_events, done.first_difference) == (whole.num_events - 1, 0)


HEAD = {"format": 2, "version": "9", "began": "", "config": {}, "first_generation": 1, "epoch_s": 0.0}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not begin"),
        (b"\xc1" * 30, "not MessagePack"),
        (msgpack.packb([1, 2]), "does not begin"),
        (msgpack.packb({"version": "9"}), "not begin"),
        (
            msgpack.packb({"format": 1, "version": "9", "began": "", "config": {}, "first_generation": 1}),
            "recorded by EPD 9 in format 1; this version replays format 2 only",
        ),
        (msgpack.packb(HEAD | {"config": {"x": 1}}), "recorded by EPD 9, with other settings"),
        (
            msgpack.packb(HEAD) + msgpack.packb([1.0, "peer", b"\x00\x00", b"", [], 0]),
            "event 2 is not valid",
        ),
    ],
)
def test_a_file_that_is_not_a_recording_is_refused(
    data: bytes, why: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(RecordingError, match=why):
        replay(io.BytesIO(data))
    file = tmp_path / "x.mpk"
    file.write_bytes(data)
    assert main(["replay", str(file)]) == 2
    assert why in capsys.readouterr().err


def test_a_recording_ends_at_its_bound_and_the_broker_goes_on(tmp_path: Path) -> None:
    with capture_logs() as logs:
        world = recorded(tmp_path, max_bytes=3000)
    assert [one["event"] for one in logs] == ["flight recorder stopped"]
    assert recording(tmp_path).stat().st_size <= 3000
    done = world.core.replayed()
    assert done.num_events
    assert done.first_difference == 0


def test_earlier_recordings_go_the_oldest_first_and_nobody_else_reads_them(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"broker-2026010{number}T000000Z-1.mpk").write_bytes(bytes(1000))
    (tmp_path / "another.mpk").write_bytes(bytes(9000))
    recorder = Recorder(str(tmp_path), 2500, BrokerConfig(), 1)
    recorder.close()
    names = sorted(path.name for path in tmp_path.glob("broker-2026010*"))
    assert names == ["broker-20260103T000000Z-1.mpk", "broker-20260104T000000Z-1.mpk"]
    assert (tmp_path / "another.mpk").exists()
    assert recorder.path.stat().st_mode & 0o777 == 0o600


def test_a_disk_that_is_full_ends_the_recording_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really_open = os.open
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(os, "open", lambda *_: really_open("/dev/full", os.O_WRONLY))
        recorder = Recorder(str(tmp_path), 1 << 20, BrokerConfig(), 1)
    recorder.tick(1.0, {}, [])
    recorder.message(2.0, "peer", [b"", b""], [])
    recorder.close()
    [told] = logs
    assert "No space left" in told["reason"]


def test_epd_replay_says_what_became_of_the_requests_in_any_process(tmp_path: Path) -> None:
    """Another process has other hashes of strings: what the core decides does not depend on them."""
    recorded(tmp_path).core.recorder.close()
    command = [sys.executable, "-m", "epd.cli", "replay", str(recording(tmp_path)), "--request", "r1"]
    told = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in "123"
    ]
    assert len({one.stdout for one in told}) == 1
    text = told[0].stdout
    assert "3 accepted, 0 refused, 1 finished, 1 failed, 0 cancelled, 1 in flight at the end" in text
    assert "replay     as it was then, in every event" in text
    assert "failures   engine_failed 1" in text
    assert "request r1: finished" in text
    assert "request r2" not in text
    assert "  retried " in text


def test_epd_replay_finds_requests_by_a_part_of_their_ids(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The endpoint adds to the ids that its clients know."""
    recorded(tmp_path).core.recorder.close()
    assert main(["replay", str(recording(tmp_path)), "--request", "r"]) == 0
    assert re.findall(r"^request (\w+): (\w+)$", capsys.readouterr().out, re.M) == [
        ("r2", "failed"), ("r1", "finished"), ("r3", "prefilling"),
    ]  # fmt: skip
    assert main(["replay", str(recording(tmp_path)), "--request", "unknown"]) == 0
    assert "no request unknown in the recording" in capsys.readouterr().out


def test_no_pixels_and_no_prompts_are_recorded(tmp_path: Path) -> None:
    recorded(tmp_path).core.recorder.close()
    data = recording(tmp_path).read_bytes()
    assert b"pixels" not in data
    assert b"engine_failed" in data
    assert re.findall(b"engine(?![-_])", data) == [], "the frames of a submit, in this world"
