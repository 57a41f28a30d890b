"""A local pipeline with light daemons in the places of broker, workers and endpoint. Real processes, no engine."""

import asyncio
import dataclasses
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from epd.config import Config, ConfigError
from epd.local import LocalPipeline, StartError, State
from epd.local.environment import free_ports, listen, make_run_directory, resolve_model, sweep
from tests.local.process_state import is_running

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(autouse=True)
def stand_ins_can_be_imported(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{ROOT}")
    tmp_path_factory.getbasetemp()  # before it is too late: pytest makes it where tempfile says
    base = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", base)  # failed starts keep their logs
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:  # what a pipeline sets for vLLM
        del os.environ[name]
    shutil.rmtree(base)


class LightPipeline(LocalPipeline):
    """The same daemons by name and order, but they do nothing; `functions` says which do something else."""

    functions: dict[str, str] = {}  # noqa: RUF012

    def _preload(self):
        return {"modules": ["stand_ins"]}

    def _specs(self):
        specs = []
        for spec in super()._specs():
            function = self.functions.get(spec.name, "endpoint" if spec.name == "endpoint" else "serve")
            if spec.argv:
                specs.append(dataclasses.replace(spec, argv=[sys.executable, "-m", "stand_ins", function]))
            else:
                args = spec.args if function == "endpoint" else []
                specs.append(dataclasses.replace(spec, target=f"stand_ins:{function}", args=args))
        return specs


def light(config=None, **more):
    config = config or Config()
    config.endpoint.port = 0
    return LightPipeline(config, **more)


async def test_a_pipeline_is_ready_when_entered_and_gone_when_left():
    async with light(encode=2) as pipeline:
        names = ["broker", "cache", "decode-0", "prefill-0", "encode-0", "encode-1", "endpoint"]
        assert sorted(pipeline.processes) == sorted(names)
        assert {daemon.state for daemon in pipeline.processes.values()} == {State.READY}
        assert pipeline.url.startswith("http://127.0.0.1:")
        assert pipeline.ready_s > 0
        assert os.stat(pipeline.run_dir).st_mode & 0o777 == 0o700
        pids = [daemon.pid for daemon in pipeline.processes.values()]
    assert pipeline.clean
    assert not any(is_running(pid) for pid in pids)
    assert not os.path.exists(pipeline.run_dir)  # noqa: ASYNC240


async def test_each_worker_has_a_side_channel_port_of_its_own():
    pipeline = light(encode=2, prefill=2, decode=2)
    pipeline.run_dir = Path("/nowhere")
    specs = [spec for spec in pipeline._specs() if "VLLM_NIXL_SIDE_CHANNEL_PORT" in spec.env]
    assert len({spec.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for spec in specs}) == len(specs) == 6


async def test_a_daemon_that_dies_ends_the_start_with_its_name_and_log(monkeypatch):
    monkeypatch.setattr(LightPipeline, "functions", {"prefill-0": "crash"})
    pipeline = light()
    with pytest.raises(StartError, match="prefill-0 exited with status 70") as caught:
        await pipeline.start()
    assert caught.value.daemon == "prefill-0"
    assert str(caught.value).endswith("  | RuntimeError: no such model")
    assert not any(is_running(daemon.pid) for daemon in pipeline.processes.values() if daemon.pid)


async def test_a_daemon_that_finds_its_configuration_wrong_ends_the_start_in_its_own_words(monkeypatch):
    monkeypatch.setattr(LightPipeline, "functions", {"encode-0": "misconfigured"})
    pipeline = light()
    with pytest.raises(ConfigError) as caught:
        await pipeline.start()
    assert str(caught.value) == "encode-0: some/model: quantization 'fp9' is not known"
    assert not pipeline.run_dir.exists()


async def test_a_daemon_that_says_what_has_failed_is_quoted_in_one_line(monkeypatch):
    monkeypatch.setattr(LightPipeline, "functions", {"decode-0": "fail"})
    with pytest.raises(StartError) as caught:
        await light().start()
    said = "decode-0 exited with status 1 while the pipeline started: ValueError: no memory for the cache; its log: /"
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


async def test_a_start_that_takes_too_long_names_the_missing_daemons(monkeypatch):
    monkeypatch.setattr(LightPipeline, "functions", {"decode-0": "never_ready"})
    with pytest.raises(StartError, match="no pipeline within 3 s; not ready: decode-0"):
        await light(start_s=3.0).start()


async def test_a_start_that_is_given_up_leaves_nothing():
    loading = asyncio.Event()
    pipeline = light(progress=lambda daemon: daemon.state is State.LOADING and loading.set())
    starting = asyncio.create_task(pipeline.start())
    async with asyncio.timeout(20):
        await loading.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(is_running(daemon.pid) for daemon in pipeline.processes.values() if daemon.pid)


async def test_a_restarted_endpoint_listens_where_it_did():
    async with light() as pipeline:
        url = pipeline.url
        pipeline.kill("endpoint", signal.SIGKILL)
        await pipeline.processes["endpoint"].exited.wait()
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))  # while there is no endpoint
        writer.write(b"GET /ready HTTP/1.0\r\n\r\n")
        daemon = await pipeline.restart("endpoint")
        assert (daemon.state, pipeline.url) == (State.READY, url)
        assert (await reader.readline()).startswith(b"HTTP/1.0 503")
        writer.close()


def holders(pipeline: LocalPipeline) -> set[str]:
    """Which daemons have the socket open that listens on the pipeline's port."""
    port = f":{int(pipeline.url.rpartition(':')[2]):04X} 00000000:0000"
    [inode] = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if port in line}
    found = set()
    for daemon in pipeline.processes.values():
        open_files = [os.readlink(file) for file in Path(f"/proc/{daemon.pid}/fd").iterdir()]
        if f"socket:[{inode}]" in open_files:
            found.add(daemon.name)
    return found


async def test_only_the_endpoint_has_the_listening_socket():
    async with light() as pipeline:
        assert holders(pipeline) == {"endpoint"}


async def test_a_one_off_process_is_waited_for():
    async with light() as pipeline:
        assert (await pipeline.call("once", "stand_ins:end_with", [0])).status == 0
        assert (await pipeline.call("once", "stand_ins:end_with", [3])).status == 3


def test_a_port_in_use_is_a_sentence():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            listen("127.0.0.1", port)


def test_a_model_folder_must_be_one(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        resolve_model(Config(model=str(tmp_path / "missing")))
    with pytest.raises(ConfigError, match=r"the folder has no config\.json"):
        resolve_model(Config(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(Config(model=str(tmp_path))).model == str(tmp_path)
    assert resolve_model(Config(model="org/name")).model == "org/name"


def test_without_a_model_it_is_the_built_in_one_and_own_options_win():
    config = resolve_model(Config(engine={"max_num_seqs": 3}))
    assert config.served_model_name == "epd/digit-reader"
    assert (config.engine["max_num_seqs"], config.engine["enforce_eager"]) == (3, True)


def test_ports_are_different_and_free():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert all(20_000 <= port < 32_000 for port in ports)


def test_old_run_directories_of_dead_owners_are_removed():
    base = Path(tempfile.gettempdir())
    old, young, alive = (base / f"epd-run-{pid}-x" for pid in (4_194_305, 4_194_306, os.getpid()))
    for path in (old, young, alive):
        path.mkdir()
    os.utime(old, (0, 0))
    os.utime(alive, (0, 0))
    made = make_run_directory()
    assert sorted(base.iterdir()) == sorted([young, alive, made])


def test_sweeping_removes_sockets_and_keeps_logs(tmp_path):
    (tmp_path / "broker.sock").touch()
    (tmp_path / "broker.log").touch()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["broker.log"]
