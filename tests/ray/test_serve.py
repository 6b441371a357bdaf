"""The whole endpoint: Ray Serve, HTTP, engine and deltas, asked by OpenAI's own client."""

import concurrent.futures
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import ray

from ftray.config.load import write_resolved
from ftray.config.serve import ServeConfig
from ftray.core.errors import ClusterError, DeltaError
from ftray.core.spec import parse, replace
from ftray.delta import manifest
from ftray.engine.api import Request, Sampling
from ftray.engine.core import StepEngine
from ftray.engine.torch_engine import TorchEngineConfig
from ftray.model.identity import base_identity
from ftray.model.tokenizer import chat_template_hash, load_tokenizer
from ftray.registry.registry import Registry
from ftray.testing import tiny
from tests.ray.endpoint import ASK, ask, publish, without_keys

pytestmark = pytest.mark.ray

KEY = "ann-key"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base that takes long sequences, so that an answer can last for seconds."""
    return tiny.tiny_base(tmp_path_factory.mktemp("base") / "long", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: tiny.random_adapter(base, root / name, r=r, seed=r)
        for name, r in (("a", 4), ("b", 8), ("c", 2))
    }


@pytest.fixture(scope="module")
def config(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    registry = publish(base, adapters, tmp_path_factory.mktemp("registry"))
    key = hashlib.sha256(KEY.encode()).hexdigest()
    settings = {
        "base": str(base),
        "registry": str(registry.root),
        "deltas": ["a", "b", "c"],
        "port": 0,
        "num_replicas": 2,
        "follow_s": 0.3,
        "admin_port": 0,
        "admin_token_sha256": hashlib.sha256(b"admin").hexdigest(),
        "metrics_key_sha256": hashlib.sha256(b"operator").hexdigest(),
        "tenants": [
            {"name": "all", "key_sha256": hashlib.sha256(b"all").hexdigest(), "deltas": ["a", "b", "c"]},
            {"name": "ann", "key_sha256": key, "deltas": ["a"]},
        ],
    }
    return parse(ServeConfig, settings)


@pytest.fixture(scope="module")
def handle(ray_cluster: None, config: ServeConfig) -> Iterator[Any]:
    from ftray.serve.ray_app import run

    handle = run(config)
    yield handle
    handle.stop()


@pytest.fixture(scope="module")
def client(handle: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{handle.url}/v1", api_key="all", max_retries=0)


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> StepEngine:
    """The same engine outside Ray."""
    engine = TorchEngineConfig().build(str(base))
    for name, folder in adapters.items():
        engine.load_delta(name, str(folder))
    return engine


@pytest.fixture(scope="module")
def endless(engine: StepEngine) -> list[int]:
    """A prompt whose greedy continuation runs in circles and never ends."""
    sampling = Sampling(max_tokens=400)
    requests = [Request(id=str(n), prompt_ids=[n], sampling=sampling) for n in range(40, 56)]
    outputs = engine.generate(requests)
    return next([int(output.id)] for output in outputs if output.finish_reason == "length")


@pytest.fixture(scope="module")
def expected(engine: StepEngine) -> dict[str, str]:
    """What it says to one request at a time."""
    ids = engine.tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=False)
    sampling = Sampling(max_tokens=24)
    return {
        name: engine.generate([Request(id="x", prompt_ids=ids, delta=delta, sampling=sampling)])[0].text
        for name, delta in (("base", None), ("a", "a"), ("b", "b"))
    }


def status(handle: Any) -> dict[str, Any]:
    """What the admin API says of the endpoint."""
    url = f"http://127.0.0.1:{handle.admin_port}/admin/status"
    found: dict[str, Any] = httpx.get(url, headers={"authorization": "Bearer admin"}).json()
    return found


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == ["base", "a", "b", "c"]


@pytest.mark.parametrize("stream", [False, True])
def test_base_and_both_deltas_at_once(client: openai.OpenAI, expected: dict[str, str], stream: bool) -> None:
    assert len(set(expected.values())) == 3
    models = ["base", "a", "b"] * 4
    with concurrent.futures.ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(lambda model: ask(client, model, stream=stream), models))
    assert answers == [expected[model] for model in models]


def test_the_digest_is_named(client: openai.OpenAI, config: ServeConfig) -> None:
    entry = Registry(config.registry).show("a")
    raw = client.chat.completions.with_raw_response.create(model="a@1", messages=ASK, max_tokens=2)
    assert raw.headers["x-ftray-digest"] == raw.parse().system_fingerprint == entry.digest


def test_unknown_model_and_bad_bodies(client: openai.OpenAI, handle: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, "nobody")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="a", messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    headers = {"authorization": "Bearer all"}
    assert httpx.post(f"{handle.url}/v1/completions", content=b"{", headers=headers).status_code == 400


def test_a_prompt_that_is_too_long_is_refused_by_the_engine(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model="a", prompt="x" * 4100)


def test_the_admin_api_listens_on_its_own_port_and_asks_for_its_token(handle: Any) -> None:
    url = f"http://127.0.0.1:{handle.admin_port}/admin/status"
    assert httpx.get(url, headers={"authorization": "Bearer all"}).status_code == 401
    found = status(handle)
    assert [row["id"] for row in found["models"]] == ["base", "a", "b", "c"]
    assert (len(found["engines"]), len(found["fronts"])) == (2, 1)
    assert httpx.get(f"{handle.url}/admin/status", headers={"authorization": "Bearer all"}).status_code == 404


def test_no_log_of_the_cluster_has_prompts_or_keys(handle: Any) -> None:
    canary = "canary-5e1c"
    url = f"{handle.url}/v1/chat/completions"
    for key, fields in (
        ("all", {}),
        ("all", {"stream": True}),
        ("all", {"model": canary}),
        ("all", {canary: 1}),
        ("all", {"messages": [{"role": canary}]}),
        (canary, {}),
    ):
        body = {
            "model": "a",
            "messages": [{"role": "user", "content": canary}],
            "max_tokens": 2,
            "user": canary,
        }
        httpx.post(url, json=body | fields, headers={"authorization": f"Bearer {key}"}, timeout=30)
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    texts = [path.read_bytes() for path in logs.rglob("*") if path.is_file()]
    assert len(texts) > 10
    for secret in (canary, KEY):
        assert not any(secret.encode() in text for text in texts)


def test_tenants_see_their_own(client: openai.OpenAI, handle: Any) -> None:
    ann = openai.OpenAI(base_url=f"{handle.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in ann.models.list().data] == ["base", "a"]
    with pytest.raises(openai.NotFoundError):
        ask(ann, "b")
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{handle.url}/v1", api_key="wrong", max_retries=0), "a")
    assert httpx.get(f"{handle.url}/healthz").status_code == 200
    assert httpx.get(f"{handle.url}/metrics").status_code == 401


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(handle: Any, endless: list[int], stream: bool) -> None:
    headers = {"authorization": "Bearer all"}
    body = {"model": "base", "prompt": endless, "max_tokens": 4000, "stream": stream, "temperature": 0}
    url = f"{handle.url}/v1/completions"

    def blocks() -> int:
        return sum(row["blocks_used"] for row in status(handle)["engines"])

    if stream:
        with httpx.stream("POST", url, json=body, headers=headers) as response:
            lines = response.iter_lines()  # closes the response when it is collected
            next(lines)
            until = time.monotonic() + 2
            while not blocks():  # replicas report every now and then
                assert time.monotonic() < until
                time.sleep(0.05)
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=headers, timeout=0.5)
    until = time.monotonic() + 3
    while blocks():
        assert time.monotonic() < until
        time.sleep(0.05)


def processes(deployment: str) -> list[psutil.Process]:
    """The replicas of a deployment."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if f"ServeReplica:ftray:{deployment}" in "".join(process.cmdline())]


def test_a_killed_replica_ends_its_streams_with_an_error_and_nothing_else(
    handle: Any, endless: list[int], client: openai.OpenAI, expected: dict[str, str]
) -> None:
    body = {"model": "base", "prompt": endless, "max_tokens": 1500, "stream": True, "temperature": 0}
    url, headers = f"{handle.url}/v1/completions", {"authorization": "Bearer all"}
    engines = processes("engine")
    assert len(engines) == 2
    started = threading.Barrier(7)

    def stream() -> list[str]:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            lines = response.iter_lines()
            first = next(lines)
            started.wait(30)
            return [first, *lines]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream) for _ in range(6)]
        started.wait(30)
        engines[0].kill()
        models = ["base", "a", "b"] * 3
        answers = list(pool.map(lambda model: ask(client, model), models))  # those without a token yet
        ended = [future.result() for future in streams]
    assert answers == [expected[model] for model in models]
    broken = [lines for lines in ended if "event: error" in lines]
    whole = [lines for lines in ended if "data: [DONE]" in lines]
    assert broken and len(broken) + len(whole) == len(ended)
    for lines in broken:
        assert "data: [DONE]" not in lines
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    until = time.monotonic() + 30
    while len(processes("engine")) < 2 or httpx.get(f"{handle.url}/healthz", timeout=30).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert ask(client, "a") == expected["a"]


def test_a_publish_is_followed_by_every_replica_also_after_the_control_was_killed(
    handle: Any, client: openai.OpenAI, config: ServeConfig, base: Path, tmp_path: Path
) -> None:
    registry = Registry(config.registry)

    def digests() -> set[str]:
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            replies = pool.map(
                lambda _: client.completions.create(model="c", prompt=[40], max_tokens=1), range(6)
            )
            return {str(reply.system_fingerprint) for reply in replies}

    def publish_and_wait(seed: int, within_s: float) -> None:
        folder = tiny.random_adapter(base, tmp_path / f"c{seed}", r=2, seed=seed)
        template = chat_template_hash(load_tokenizer(base))
        manifest.write(folder, kind="low_rank", base=base_identity(base), chat_template_hash=template)
        new = registry.publish(folder, "c").digest
        until = time.monotonic() + within_s
        while digests() != {new}:
            assert time.monotonic() < until
            time.sleep(0.1)

    publish_and_wait(11, 10)
    (control,) = processes("control")
    control.kill()
    assert len(digests()) == 1  # nobody needs it to answer
    publish_and_wait(12, 30)


def test_a_delta_of_another_base_or_template_is_refused_before_anything_starts(
    ray_cluster: None, config: ServeConfig, base: Path, tmp_path: Path
) -> None:
    from ftray.serve.ray_app import run

    other = tiny.tiny_base(tmp_path / "other", seed=9)
    for name, identity, template in (
        ("foreign", base_identity(other), chat_template_hash(load_tokenizer(other))),
        ("template", base_identity(base), "xxh3:" + "1" * 32),
    ):
        folder = tiny.random_adapter(other, tmp_path / name)
        manifest.write(folder, kind="low_rank", base=identity, chat_template_hash=template)
        Registry(config.registry).publish(folder, name)
        with pytest.raises(DeltaError) as caught:
            run(replace(without_keys(config), "deltas", [name]))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_second_endpoint_is_refused_and_leaves_the_first_alone(
    config: ServeConfig, client: openai.OpenAI, expected: dict[str, str]
) -> None:
    from ftray.serve.ray_app import run

    with pytest.raises(ClusterError, match="has an endpoint already") as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert ask(client, "b") == expected["b"]


def test_what_others_serve_outlives_a_start_that_fails(handle: Any, config: ServeConfig) -> None:
    from ray import serve

    from ftray.serve.ray_app import run

    @serve.deployment
    class Other:
        def __call__(self) -> str:
            return "other"

    handle.stop()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(Other.bind(), name="other", route_prefix="/")  # where ours would have to be
        with pytest.raises(ClusterError, match=f"listens at 127.0.0.1:{port}"):
            run(replace(config, "port", port + 1))
        with pytest.raises(ClusterError, match="could not start"):
            run(config)
        assert httpx.get(f"http://127.0.0.1:{port}/", timeout=10).text == "other"
    finally:
        serve.shutdown()


def test_the_command_serves_until_told_to_stop_and_leaves_no_process(
    config: ServeConfig, expected: dict[str, str], endless: list[int], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path / "serve.yaml"
    write_resolved(without_keys(config), file)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ftray.cli.main", "serve", str(file), f"port={port}", "deltas=[b]"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        shown = [next(process.stdout) for _ in range(6)]
        assert f"serving at http://127.0.0.1:{port}/v1" in shown[0], shown
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0)
        assert ask(client, "b") == expected["b"]
        curl = next(line for line in shown if "chat/completions" in line)
        reply = json.loads(subprocess.run(curl, shell=True, capture_output=True, check=True).stdout)
        assert reply["object"] == "chat.completion"
        mine = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        body = {"model": "base", "prompt": endless, "max_tokens": 300, "stream": True, "temperature": 0}
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"  # what has begun is finished
        assert process.wait(30) == 0, process.stdout.read()
        _, alive = psutil.wait_procs(mine[1:], timeout=5)
        assert len(mine) > 3 and not alive
        rest = process.stdout.read()
        assert "Traceback" not in rest
    finally:
        process.kill()
        process.wait()
