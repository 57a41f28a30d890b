"""What the endpoint lets media take: memory, threads and time.

Lives in the endpoint process, one for the process; owns the budget of decoded media and the threads that open,
decode and process them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.budget import Budget
from epd.endpoint.media.lanes import Lane, OverdueError, StuckError
from epd.errors import ErrorCode

_NUM_THREADS = 8
_RETRY_AFTER_S = 5.0

Result = TypeVar("Result")


class MediaBounds:
    """The limits of one endpoint.

    Args:
        config: the endpoint's.

    Attributes:
        is_processed: whether a picture whose pixels have this name need not be decoded any more.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self.budget = Budget(config.max_total_decoded_bytes, config.max_request_decoded_bytes)
        self.is_processed: Callable[[str], bool] = lambda _: False
        self._opening = Lane("media", _NUM_THREADS)
        self._processing = Lane("processor", 1)

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Opens, checks or decodes one medium in a thread.

        Raises:
            RefusedError: it takes too long, or too many calls that did are still running.
        """
        return await self._run(self._opening, function, *args)

    async def process(self, function: Callable[..., Result], *args: Any) -> Result:
        """Runs the model's processor on the media of one request; one request at a time.

        Raises:
            RefusedError: as for `run`.
        """
        return await self._run(self._processing, function, *args)

    def held(self) -> dict[str, int]:
        """What is held now, by kind: bytes of decoded media, and calls that were given up but are still running."""
        num_stuck = self._opening.num_stuck + self._processing.num_stuck
        return {"decoded_media_bytes": self.budget.num_bytes, "stuck_media_threads": num_stuck}

    def close(self) -> None:
        """Ends the threads."""
        self._opening.close()
        self._processing.close()

    async def _run(self, lane: Lane, function: Callable[..., Result], *args: Any) -> Result:
        try:
            result: Result = await lane.run(function, *args, timeout_s=self.config.media_timeout_s)
        except OverdueError:
            raise media_timeout(self.config) from None
        except StuckError as error:
            raise RefusedError(ErrorCode.OVERLOADED, str(error), _RETRY_AFTER_S) from None
        return result


def media_timeout(config: EndpointConfig) -> RefusedError:
    """The answer to a request whose media take too much time."""
    text = f"a medium could not be fetched, decoded or processed within {config.media_timeout_s:g} s"
    return RefusedError(ErrorCode.MEDIA_TIMEOUT, text)
