"""The synchronous client: the asynchronous one on an event loop of its own.

Lives in the user's process. Each ``Client`` owns one daemon thread, started by its first call; it
runs one event loop, and on it one ``AsyncClient``. A call hands its coroutine over and waits, so it
works in any thread, even one whose own event loop is running (which it blocks meanwhile).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from epd.client.async_client import AsyncClient
from epd.client.errors import StreamInterrupted
from epd.client.types import Chunk, Timeouts

__all__ = ["Client"]

P = ParamSpec("P")
R = TypeVar("R")
_CLOSE_WAIT_S = 5.0


class _Portal:
    """A daemon thread that keeps an ``AsyncClient`` open on its own event loop until ``close``."""

    def __init__(self, client: AsyncClient) -> None:
        self._lock = threading.RLock()  # the garbage collector may close a stream while it is held
        self._closing = False
        self._client = client
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="epd-client", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    def is_current_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def call(self, work: Coroutine[Any, Any, R]) -> R:
        """Run the coroutine in that thread and wait for it; if the wait is interrupted, so is the work."""
        future = self.submit(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise StreamInterrupted("the client was closed during the call") from None
        finally:
            future.cancel()  # no effect on finished work

    def submit(self, work: Coroutine[Any, Any, R]) -> concurrent.futures.Future[R]:
        """Start the coroutine in that thread."""
        with self._lock:  # nothing may be submitted after the stop: it would never be answered
            if not self._closing:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RuntimeError("this client is closed")

    def close(self) -> None:
        """Close the client, cancel what is left and end the thread. May be called again."""
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)
        if not self.is_current_thread():
            self._thread.join(_CLOSE_WAIT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._keep_open())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _keep_open(self) -> None:
        async with self._client:
            self._started.set_result(asyncio.get_running_loop())
            await self._stop.wait()


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Client, P], R]:
    """Make the synchronous twin of a method of ``AsyncClient``."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._open().call(method(self._client, *args, **kwargs))

    return call


def _blocking_iterator(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[Chunk, None]],
) -> Callable[Concatenate[Client, P], Generator[Chunk, None, None]]:
    """Make the synchronous twin of a streaming method of ``AsyncClient``."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Generator[Chunk, None, None]:
        return iterate(self, method(self._client, *args, **kwargs))

    def iterate(client: Client, chunks: AsyncGenerator[Chunk, None]) -> Generator[Chunk, None, None]:
        portal = client._open()
        turn = asyncio.Lock()
        stepping: asyncio.Task[Any] | None = None

        async def step() -> Chunk | None:
            nonlocal stepping
            async with turn:
                stepping = asyncio.current_task()
                try:
                    return await anext(chunks, None)
                finally:
                    stepping = None

        async def close() -> None:
            if stepping is not None:  # Ctrl-C may have interrupted the wait before it could cancel this
                stepping.cancel()
            async with turn:  # a generator cannot be closed while it runs
                await chunks.aclose()

        try:
            while (chunk := portal.call(step())) is not None:
                yield chunk
        finally:
            with contextlib.suppress(RuntimeError, StreamInterrupted):  # closed: so is the connection
                if portal.is_current_thread():  # the garbage collector may run there
                    portal.submit(close())
                else:
                    portal.call(close())

    return call


class Client:
    """Talks to an EPD endpoint, synchronously; the methods are those of ``AsyncClient``.

    May be shared by threads. Close it, or use it as ``with Client() as client``.

    Args:
        base_url: Where the endpoint listens, with or without ``/v1``.
        api_key: Sent as a bearer token.
        model: The model of calls that name none; without it the server uses its own.
        timeouts: The clocks of every call.
        reuse_pictures: Upload a picture when it is used a second time, as ``AsyncClient`` does.

    Raises:
        ValueError: ``base_url`` is not an http or https URL.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8400",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
        reuse_pictures: bool = True,
    ) -> None:
        self._client = AsyncClient(
            base_url, api_key=api_key, model=model, timeouts=timeouts, reuse_pictures=reuse_pictures
        )
        self._lock = threading.Lock()
        self._portal: _Portal | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection and end the thread; calls in progress fail. May be called again."""
        with self._lock:
            self._closed = True
            portal = self._portal
        if portal is not None:
            portal.close()

    def _open(self) -> _Portal:
        with self._lock:
            if self._closed:
                raise RuntimeError("this client is closed")
            if self._portal is None:
                self._portal = _Portal(self._client)
                weakref.finalize(self, self._portal.close)  # for a client that nobody closes
            return self._portal

    generate = _blocking(AsyncClient.generate)
    stream = _blocking_iterator(AsyncClient.stream)
    upload = _blocking(AsyncClient.upload)
    models = _blocking(AsyncClient.models)
    health = _blocking(AsyncClient.health)
    ready = _blocking(AsyncClient.ready)
    request = _blocking(AsyncClient.request)
    cancel = _blocking(AsyncClient.cancel)
    cache = _blocking(AsyncClient.cache)
