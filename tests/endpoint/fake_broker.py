"""A broker that is only a socket: welcomes the endpoint and answers each request as its script says."""

import asyncio
from collections import defaultdict

import msgspec
import zmq
import zmq.asyncio

from epd.messages import (
    CacheState,
    Cancel,
    Counters,
    DropUpload,
    Failed,
    GetCache,
    GetStory,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Outputs,
    RequestOutput,
    Stage,
    Status,
    Story,
    StoryEvent,
    Submit,
    Unknown,
    Upload,
    Uploaded,
    Welcome,
    WorkerInfo,
    WorkerStatus,
)
from epd.transport import wire

STORY = [StoryEvent(at_s=0.0, event="accepted"), StoryEvent(at_s=0.5, event="finished", worker="decode-0")]
ALL_STAGES = (Stage.ENCODE, Stage.PREFILL, Stage.DECODE)


class FakeBroker:
    """Enter it as an async context manager; `script` is awaited for each SUBMIT in a task of its own.

    UPLOADs are answered at once, unless `answer_uploads` is false or `upload_error` has UPLOADED's further fields.
    """

    def __init__(self, heartbeat_s=0.2, lost_after_s=5.0):
        self._welcome = Welcome(heartbeat_s=heartbeat_s, lost_after_s=lost_after_s)
        self._context = zmq.asyncio.Context()
        self._tasks = set()
        self.script = None
        self.peer = None
        self.silent = False
        self.submits, self.frames = [], {}
        self.uploads, self.upload_frames, self.drops = [], {}, []
        self.answer_uploads, self.upload_error = True, {}
        self.num_hellos = 0
        self.cancels = []
        self.cancelled = defaultdict(asyncio.Event)
        self.goodbye = asyncio.Event()
        self.status = status_of(ALL_STAGES)
        self.story_state = "decoding"

    async def __aenter__(self):
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_):
        self._reader.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._reader, *self._tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def send(self, message, frames=()):
        """Sends to the endpoint; all frames are those of the one output, where there is one."""
        if isinstance(message, RequestOutput):
            message = Outputs(outputs=[msgspec.structs.replace(message, num_frames=len(frames))])
        await self._socket.send_multipart([self.peer, *wire.encode(message, frames)])

    async def _read(self):
        while True:
            peer, *parts = await self._socket.recv_multipart()
            if self.silent:
                continue
            message, frames = wire.decode(parts)
            match message:
                case Hello():
                    self.num_hellos += self.peer != peer
                    self.peer = peer
                    await self.send(self._welcome)
                    await self.send(self.status)
                case Heartbeat():
                    await self.send(HeartbeatAck())
                case Goodbye():
                    self.goodbye.set()
                case Submit():
                    self.submits.append(message)
                    self.frames[message.request_id] = frames
                    task = asyncio.create_task(self.script(self, message, frames))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case Upload():
                    self.uploads.append(message)
                    self.upload_frames[message.upload_id] = frames
                    if self.answer_uploads:
                        await self.send(Uploaded(upload_id=message.upload_id, **self.upload_error))
                case DropUpload():
                    self.drops.append(message.upload_id)
                case Cancel():
                    self.cancels.append(message)
                    self.cancelled[message.request_id].set()
                case GetCache():
                    await self.send(CacheState())
                case GetStory():
                    await self.send(
                        Story(request_id=message.request_id, found=True, state=self.story_state, events=STORY[:1])
                    )

    async def die(self):
        """As a broker that is killed: nothing more comes of it, and the endpoint notices at once."""
        for task in self._tasks:
            task.cancel()
        await self.send(Unknown())
        self.silent = True

    def live(self):
        """As the next broker, which knows nothing."""
        self.silent = False

    async def forget(self):
        """As after a restart: the endpoint is unknown and has to register again."""
        await self.send(Unknown())

    async def set_workers(self, *roles, num_pools=1):
        self.status = status_of(roles, num_pools)
        await self.send(self.status)


def status_of(roles, num_pools=1):
    proved = WorkerInfo(units={"image": "tile"}, tokens_per_patch={"image": 4})
    workers = [
        WorkerStatus(
            name=f"{role}-{i}",
            stage=role,
            incarnation=str(i),
            host="h",
            pid=i,
            info=proved if role is Stage.ENCODE else WorkerInfo(),
        )
        for i, role in enumerate(roles)
    ]
    return Status(
        workers=workers,
        counters=Counters(num_accepted=3, held_pins=1),
        num_pools=num_pools,
        broker_held={"pins": 1},
        peers_held={"cache": {"pools": 1}},
        is_whole=True,
    )


def output(request_id, token_ids, finish=None, **fields):
    """One engine output as the frames a worker sends."""
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.serial_utils import MsgpackEncoder

    reason = getattr(FinishReason, finish.upper()) if finish else None
    return MsgpackEncoder().encode(EngineCoreOutput(request_id, list(token_ids), finish_reason=reason, **fields))


def says(token_ids, finish="length", delay_s=0.0):
    """A script: these tokens one by one, then finished."""

    async def script(broker, submit, _frames):
        for i, token in enumerate(token_ids):
            await asyncio.sleep(delay_s)
            is_last = i == len(token_ids) - 1
            frames = output(submit.request_id, [token], finish if is_last else None)
            if is_last:
                last = RequestOutput(request_id=submit.request_id, token_ids=[7], finish_reason=finish, story=STORY)
                await broker.send(last, frames)
            else:
                await broker.send(RequestOutput(request_id=submit.request_id, token_ids=[7]), frames)

    return script


def fails(after=(), **fields):
    """A script: these tokens, then FAILED with these fields."""

    async def script(broker, submit, _frames):
        for token in after:
            await broker.send(
                RequestOutput(request_id=submit.request_id, token_ids=[7]), output(submit.request_id, [token])
            )
            await asyncio.sleep(0.1)  # vLLM's collector merges what comes at once; let the first be streamed
        await broker.send(Failed(request_id=submit.request_id, story=STORY, **fields))

    return script


def needs_pixels(then):
    """A script: patches without frames are missing; otherwise `then`."""

    async def script(broker, submit, frames):
        if any(not patch.num_frames for patch in submit.patches):
            refusal = Failed(request_id=submit.request_id, code="pixels_needed", message="gone", status=503)
            await broker.send(refusal)
        else:
            await then(broker, submit, frames)

    return script


async def never(_broker, _submit, _frames):
    """A script: no answer."""
