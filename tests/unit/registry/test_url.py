"""A registry behind a URL: in memory, and in an S3 bucket over HTTP against moto's server on the loopback."""

import json
import multiprocessing
import os
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from ftray.cli.main import main
from ftray.core.errors import RegistryError
from ftray.registry.gc import collect
from ftray.registry.registry import Registry
from ftray.registry.url import UrlShelf
from ftray.testing.deltas import weights_delta
from tests.buckets import empty_bucket
from tests.unit.registry.publishers import NUM_PUBLISHERS, publish_at_once


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    # One request at a time: moto looks for the key and then puts it, which in S3 is one thing.
    server = make_server("127.0.0.1", 0, DomainDispatcherApplication(create_backend_app), threaded=False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with empty_bucket(endpoint, "deltas", monkeypatch):
        yield "s3://deltas/registry"


@pytest.fixture(params=["memory", "s3"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Registry]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if request.param == "s3":
        yield Registry(request.getfixturevalue("bucket"))
        return
    yield Registry("memory://registry")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    return weights_delta(tmp_path / "delta", metrics={"eval_loss": 2.0})


def keys(registry: Registry) -> dict[str, str]:
    """What lies in the store: name below the registry -> path there."""
    shelf = registry.shelf
    assert isinstance(shelf, UrlShelf)
    return {path.partition("registry/")[2]: path for path in shelf._fs.find(shelf._root)}


def test_publish_resolve_promote(registry: Registry, delta: Path) -> None:
    first = registry.publish(delta, "tone", aliases=["prod"])
    (delta / "README.md").write_text("second")
    second = registry.publish(weights_delta(delta, seed=1), "tone")
    assert (first.ref, second.ref) == ("tone@1", "tone@2") and first.digest != second.digest
    found = registry.resolve("tone@prod")
    assert found.ref == "tone@1" and found.aliases == ("prod",)
    assert {path.name for path in found.path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ftray_delta.json",
        "ftray_version.json",
    }
    before = registry.stamps(["tone", "other"])
    assert before == {"tone": (2, 1), "other": (0, 0)}
    registry.promote("tone@2")
    assert registry.stamps(["tone"])["tone"] == (2, 2)
    assert registry.rollback("tone").version == 1
    assert [entry.ref for entry in registry.list()] == ["tone@1", "tone@2"]
    with pytest.raises(RegistryError, match="did you mean tone"):
        registry.resolve("tonne")


@pytest.mark.parametrize("fault", ["open", "link", "file"])
def test_copies_where_others_could_write_are_refused(registry: Registry, delta: Path, fault: str) -> None:
    registry.publish(delta, "tone")
    (own,) = Path(tempfile.gettempdir()).glob("ftray-copies-*")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    if fault == "open":
        own.chmod(0o755)
    else:
        moved = own.rename(own.with_name("moved"))
        if fault == "link":
            own.symlink_to(moved)
        else:
            own.write_text("")
    with pytest.raises(RegistryError, match="not a folder of this user alone") as caught:
        registry.resolve("tone@1")
    assert "\n" not in str(caught.value)


def test_a_record_beside_a_copy_is_not_believed(registry: Registry, delta: Path) -> None:
    published = registry.publish(delta, "tone")
    record = registry.resolve("tone@1").path / "ftray_version.json"
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"published_at": "1999-01-01T00:00:00+00:00"})
    )
    assert registry.resolve("tone@1").published_at == published.published_at


def test_what_is_damaged_there_is_named_and_what_is_damaged_here_is_fetched(
    registry: Registry, delta: Path
) -> None:
    path = registry.publish(delta, "tone").path
    weights = registry.resolve("tone").path / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"x" + good[1:])
    assert registry.resolve("tone").path == path and weights.read_bytes() == good
    (there,) = (there for name, there in keys(registry).items() if name.endswith("adapter_model.safetensors"))
    assert isinstance(registry.shelf, UrlShelf)
    registry.shelf._fs.pipe_file(there, b"x" + good[1:])
    weights.unlink()
    with pytest.raises(RegistryError, match=r"tone@1 is damaged: .*adapter_model\.safetensors"):
        registry.resolve("tone")


def test_a_record_cannot_point_elsewhere(registry: Registry, delta: Path) -> None:
    registry.publish(delta, "tone")
    assert isinstance(registry.shelf, UrlShelf)
    record = registry.shelf._record("tone", 1)
    for upload in ("../../other", "/etc", "a/b"):
        registry.shelf._put(
            "tone/versions/000002.json", str(record | {"upload": upload}).replace("'", '"').encode()
        )
        with pytest.raises(RegistryError, match="no plain name"):
            registry.resolve("tone@2")


def test_a_version_is_there_when_its_record_is(registry: Registry, delta: Path) -> None:
    """Whatever a publisher was killed after: uploads alone are no version, and old ones are swept."""
    assert isinstance(registry.shelf, UrlShelf)
    registry.publish(delta, "tone")
    made = keys(registry)
    fs, root = registry.shelf._fs, registry.shelf._root
    for name, path in made.items():
        if "/uploads/" in name:
            old = path.replace(name.split("/")[2], "20200101T000000-aaaa")
            fs.pipe_file(old, fs.cat_file(path))
            fs.pipe_file(old.replace("20200101T000000-aaaa", "29990101T000000-aaaa"), b"young")
    assert registry.versions("tone") == [1]
    assert registry.publish(delta, "tone").version == 2
    collect(registry, delete=True)
    uploads = {path.split("/uploads/")[1].split("/")[0] for path in fs.find(root) if "/uploads/" in path}
    assert "20200101T000000-aaaa" not in uploads and "29990101T000000-aaaa" in uploads and len(uploads) == 3
    assert registry.resolve("tone@1").digest == registry.resolve("tone@2").digest


def test_collected_there_too(registry: Registry, delta: Path) -> None:
    for _ in range(5):
        registry.publish(delta, "tone")
    registry.promote("tone@1")
    registry.promote("tone@2")
    plan = collect(registry, keep=1, min_age_s=0)
    assert plan.removed == ["tone@3", "tone@4"] and registry.versions("tone") == [1, 2, 3, 4, 5]
    assert collect(registry, delete=True, keep=1, min_age_s=0) == plan
    assert registry.versions("tone") == [1, 2, 5] and registry.rollback("tone").version == 1
    assert len({name.split("/")[2] for name in keys(registry) if "/uploads/" in name}) == 3
    assert registry.publish(delta, "tone").version == 6
    assert not [name for name in keys(registry) if name.endswith(".gone") or name.startswith("_")]


def test_local_copies_are_bounded(registry: Registry, delta: Path) -> None:
    paths = [registry.resolve(registry.publish(delta, "tone").ref).path for _ in range(3)]
    assert isinstance(registry.shelf, UrlShelf)
    registry.shelf._copies.max_bytes = 1
    os.utime(paths[0], (0, 0))
    registry.resolve(registry.publish(delta, "tone").ref)
    assert [path.exists() for path in paths] == [False, True, True], "what was just used stays"
    assert registry.resolve("tone@1").path == paths[0]


def test_threads_get_unique_versions(registry: Registry, delta: Path) -> None:
    with ThreadPoolExecutor(NUM_PUBLISHERS) as pool:
        publish = [
            pool.submit(registry.publish, delta, "tone", aliases=["prod"]) for _ in range(NUM_PUBLISHERS)
        ]
        versions = sorted(done.result().version for done in publish)
    assert versions == list(range(1, NUM_PUBLISHERS + 1))
    state = registry.state("tone")
    assert sorted(state.aliases["prod"]) == versions, "no promotion is lost"


@pytest.mark.slow
def test_concurrent_publishers_get_unique_rising_versions(bucket: str, delta: Path) -> None:
    everything = publish_at_once(bucket, delta, 2)
    assert [entry.version for entry in Registry(bucket).list()] == everything


def _publish_for_ever(root: str, delta: Path) -> None:
    registry = Registry(root)
    while True:
        registry.publish(delta, "tone", aliases=["prod"])


@pytest.mark.slow
def test_killed_publishers_leave_old_or_new(bucket: str, delta: Path) -> None:
    context = multiprocessing.get_context("spawn")
    registry = Registry(bucket)
    registry.publish(delta, "tone", aliases=["prod"])
    for round_ in range(3):
        process = context.Process(target=_publish_for_ever, args=(bucket, delta))
        process.start()
        start = registry.versions("tone")[-1]
        while registry.versions("tone")[-1] < start + 2:
            time.sleep(0.01)
        time.sleep(0.013 * round_)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        versions = registry.versions("tone")
        assert versions == list(range(1, len(versions) + 1))
        assert registry.resolve(f"tone@{versions[-1]}").delta.metrics == {"eval_loss": 2.0}
        assert registry.resolve("tone@prod").version in versions[-2:]


def test_verbs_take_a_url(bucket: str, delta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["publish", delta, "tone", "--alias", "prod"],
        ["list"],
        ["show", "tone@prod"],
        ["promote", "tone", "--alias", "canary"],
        ["registry", "gc"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--registry", bucket])
        assert ended.value.code == 0 and "tone@1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["list", "--registry", "nowhere://x"])
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err


def test_what_cannot_be_reached_is_one_line(bucket: str, delta: Path) -> None:
    with pytest.raises(RegistryError, match=r"^s3://nobody/r/[^\n]*cannot be written[^\n]*$"):
        Registry("s3://nobody/r").publish(delta, "tone")
