"""Puts the endpoint together: vLLM's app over our engine client, carried by aiohttp.

Lives in the endpoint process; owns the HTTP server, the link's lifetime and the registered metrics. Written against
vLLM 0.32 (`vllm.entrypoints.launchers`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
from types import TracebackType
from typing import Self

import msgspec
import prometheus_client
import structlog
from aiohttp import web
from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import VLLMClientError
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from epd.config import Config, ConfigError
from epd.endpoint.engine import stat_loggers
from epd.endpoint.engine.engine_client import PipelineCore
from epd.endpoint.engine.llm import PipelineLLM
from epd.endpoint.engine.submission import PipelineError
from epd.endpoint.http.asgi import App, AsgiBridge, Lifespan
from epd.endpoint.http.authentication import ApiKeys
from epd.endpoint.http.bodies import Bodies
from epd.endpoint.http.failures import ExplicitErrors, failure_of
from epd.endpoint.http.limits import Limits
from epd.endpoint.http.listening import runner_of
from epd.endpoint.http.options import serve_args, vllm_config_of
from epd.endpoint.http.unreadable import UnreadableInput, unreadable_body
from epd.endpoint.media import connector
from epd.endpoint.media.bounds import MediaBounds
from epd.endpoint.media.routes import MediaRoutes
from epd.endpoint.ops import metrics, readiness
from epd.endpoint.ops.models import ModelRoutes
from epd.endpoint.ops.request_log import WATCHED_PATHS, RequestLog, quiet_refusals
from epd.endpoint.ops.routes import OpsRoutes
from epd.endpoint.ops.vllm_families import drop_http
from epd.endpoint.ops.warmup import warm_up
from epd.errors import ErrorCode
from epd.process import activation, logs, resources

log = structlog.get_logger()

_TASKS = ("generate",)
_END_S = 2.0
_REQUEST_LOGGERS = ("vllm.entrypoints.serve.utils.request_logger", "vllm.v1.engine.async_llm")


class Endpoint:
    """The endpoint as an async context manager: while entered, it listens, and is registered as soon as possible.

    Args:
        config: the pipeline's configuration.
        name: this endpoint's name for the broker.
    """

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._name = config, name
        self._stack = contextlib.AsyncExitStack()
        self._bounds = MediaBounds(config.endpoint)
        self.died = asyncio.Event()
        self.warming = config.endpoint.warm_up
        self.port = 0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        args = serve_args(self._config)
        vllm_config = vllm_config_of(args)
        if args.enable_log_requests:
            logs.hear(*_REQUEST_LOGGERS)
        quiet_refusals(VLLMClientError, PipelineError)
        self.core = PipelineCore(self._config, vllm_config, self._name)
        async with contextlib.AsyncExitStack() as stack:
            llm = PipelineLLM(
                vllm_config,
                self.core,
                self._bounds,
                log_stats=not args.disable_log_stats,
                log_requests=args.enable_log_requests,
            )
            stack.callback(llm.shutdown)
            stack.callback(self._bounds.close)
            stack.push_async_callback(connector.close)
            self._watch(llm.output_handler)
            app = await self._app(args, llm)
            await stack.enter_async_context(Lifespan(app))
            self.bridge = AsgiBridge(self._around(app, args), refusal=unreadable_body)
            stat_loggers.install(llm, self.core.flights, self.core.request_times, prometheus_client.REGISTRY)
            collector = metrics.Collector(self.view, vllm_config.model_config.served_model_name)
            prometheus_client.REGISTRY.register(collector)
            stack.callback(prometheus_client.REGISTRY.unregister, collector)
            await stack.enter_async_context(self.core.link)
            sweeper = asyncio.create_task(self.core.uploads.keep_sweeping(), name="sweep-uploads")
            stack.callback(sweeper.cancel)
            tls = _ssl_context(args)
            await self._listen(stack, tls)
            warmer = asyncio.create_task(self._warm_up(has_tls=tls is not None), name="warm-up")
            stack.callback(warmer.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def view(self) -> readiness.View:
        """What the endpoint sees of the pipeline now."""
        return readiness.View(
            registered=self.core.link.registered,
            draining=self.core.draining,
            warming=self.warming,
            num_in_flight=self.core.num_in_flight,
            status=self.core.status,
            name=self._name,
            held=self.held(),
        )

    def held(self) -> dict[str, int]:
        """What this process holds, by kind; may be called from any thread, as vLLM's /metrics does."""
        held = resources.of_process(self._loop) | self.core.held() | self._bounds.held()
        return held | {"exchanges": self.bridge.num_active}

    async def _warm_up(self, *, has_tls: bool) -> None:
        """Once the pipeline is complete, sends a request through every prefill and decode worker."""
        if self.warming and not has_tls:
            while readiness.missing(msgspec.structs.replace(self.view(), warming=False)):
                self.core.status_changed.clear()
                await self.core.status_changed.wait()
            endpoint, counts = self._config.endpoint, readiness.num_workers(self.core.status)
            host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(endpoint.host, endpoint.host)
            model = self._config.served_model_name or self._config.model
            key = endpoint.api_keys[0] if endpoint.api_keys else ""
            await warm_up(f"http://{host}:{self.port}", model, key, max(counts["prefill"], counts["decode"]))
        self.warming = False

    async def drain(self, timeout_s: float) -> None:
        """Takes no new requests and lets current ones end; those that have not after `timeout_s` fail with 503.

        If somebody else owns the listening socket, new connections wait in it for the next endpoint, and idle ones are
        closed; otherwise new requests are answered with 503.
        """
        if self._successor:
            await self._site.stop()
            self.bridge.close_connections()
            if self._runner.server is not None:
                self._runner.server.pre_shutdown()
        else:
            self.core.draining = True
        try:
            await asyncio.wait_for(self.bridge.wait_idle(), timeout_s)
        except TimeoutError:
            log.warning("requests are cut off", num_in_flight=self.core.num_in_flight)
            self.core.flights.fail_all(failure_of(ErrorCode.SHUTTING_DOWN, "this endpoint is shutting down"))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.bridge.wait_idle(), _END_S)
        self.core.link.goodbye("drained")

    async def _app(self, args: argparse.Namespace, llm: PipelineLLM) -> FastAPI:
        if args.tool_parser_plugin:
            ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        app: FastAPI = build_app(args, _TASKS, llm.model_config)
        has_keys = bool(self._config.endpoint.api_keys)
        OpsRoutes(self.core, self.view, has_keys=has_keys).add_to(app)
        media = MediaRoutes(self.core, has_keys=has_keys)
        media.add_to(app)
        ModelRoutes(lambda: self.core.status).add_to(app)
        # Innermost: behind keys and metrics, before any handler.
        app.user_middleware.append(Middleware(Bodies, max_bytes=self._config.endpoint.max_bodies_bytes))
        app.user_middleware.append(Middleware(Limits, bounds=self._bounds, find_media=media.find))
        app.user_middleware.append(Middleware(UnreadableInput))
        drop_http(prometheus_client.REGISTRY)
        app.middleware_stack = app.build_middleware_stack()  # build_app has built one already
        try:
            await init_app_state(llm, app.state, args, _TASKS)
        except ValueError as error:  # for example an adapter that cannot be served
            raise ConfigError(str(error)) from error
        app.state.server = _Uvicorn(self.died)
        return app

    def _around(self, app: App, args: argparse.Namespace) -> App:
        """The middleware in front of vLLM's application, the innermost first."""
        keys = self._config.endpoint.api_keys
        app = ExplicitErrors(app, has_keys=bool(keys))
        if keys:
            app = ApiKeys(app, keys)
        if not args.disable_uvicorn_access_log:
            silent = filter(None, (args.disable_access_log_for_endpoints or "").split(","))
            app = RequestLog(app, self.core.stories, WATCHED_PATHS | set(silent))
        return app

    async def _listen(self, stack: contextlib.AsyncExitStack, tls: ssl.SSLContext | None) -> None:
        runner = runner_of(self.bridge, _END_S)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        endpoint, inherited = self._config.endpoint, activation.inherited()
        self._site = (
            web.TCPSite(runner, endpoint.host, endpoint.port, ssl_context=tls)
            if inherited is None
            else web.SockSite(runner, inherited, ssl_context=tls)
        )
        await self._site.start()
        self._runner, self._successor = runner, inherited is not None
        self.port = runner.addresses[0][1]

    def _watch(self, output_handler: asyncio.Task[None]) -> None:
        """Watches vLLM's output handler, which runs for ever; once it has ended, no request can end."""
        output_handler.add_done_callback(lambda _: self.died.set())


class _Uvicorn:
    """What vLLM's error handlers take to be their server: they ask it to exit when the engine is dead."""

    def __init__(self, died: asyncio.Event) -> None:
        self._died = died

    @property
    def should_exit(self) -> bool:
        return self._died.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._died.set()


def _ssl_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    if not args.ssl_certfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=args.ssl_ca_certs)
    context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
    context.verify_mode = ssl.VerifyMode(args.ssl_cert_reqs)
    return context
