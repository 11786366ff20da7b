"""Stores at s3://, against a real S3-compatible server on this machine, with faults on the way."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from logitcache import as_torch_dataset, build, open_store, remote
from logitcache import files as remote_files
from logitcache.cli import cli as store_cli
from logitcache.errors import ResourceError, StoreError
from logitcache.files import FAILPOINT


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on, writes down which, and does what the next of ``faults`` says to GETs."""

    port = 0
    faults: list[str] = []  # noqa: RUF012  (shared by all requests, on purpose)
    seen: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
        server.request(self.command, self.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        fault = ""
        if self.command == "GET" and "list-type" not in self.path:
            self.seen.append(self.path)
            fault = self.faults.pop() if self.faults else ""
        if fault == "503":
            self.send_error(503)
            return
        if fault == "stall":
            time.sleep(2)
            return
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("transfer-encoding", "connection", "content-length", "server"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.close_connection = True

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """moto's S3 behind the proxy, a bucket in it, and the variables that lead there."""
    for name in ("obstore", "moto"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("needs obstore and moto: pip install '.[dev]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, **quiet)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        Proxy.port = port
        endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        make = urllib.request.Request(f"{endpoint}/bucket", method="PUT")
        urllib.request.urlopen(make).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ACCESS_KEY_ID", "any")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
            patch.setenv("AWS_REGION", "us-east-1")
            patch.setitem(remote._RETRY, "max_retries", 2)
            patch.setitem(remote._RETRY, "retry_timeout", timedelta(seconds=10))
            yield SimpleNamespace(endpoint=endpoint)
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        process.terminate()
        process.wait()


@pytest.fixture
def uploaded(server, built, tmp_path, monkeypatch, request):
    """The shared store at a URL of the test's own, and an empty folder for what is fetched."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    url = f"s3://bucket/{request.node.name}/store"
    upload(built.path, url)
    Proxy.faults.clear()
    Proxy.seen.clear()
    return url


def change(url: str, name: str, content: bytes | None) -> None:
    """Put an object of a store, or delete it; past the proxy."""
    path = f"http://127.0.0.1:{Proxy.port}/{url.removeprefix('s3://')}/{name}"
    method = "DELETE" if content is None else "PUT"
    headers = {
        "Content-Type": "application/octet-stream",  # else Flask would read a form
        "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
        # moto asks for an owner, and checks no signature.
        "Authorization": "AWS4-HMAC-SHA256 Credential=any/20260101/us-east-1/s3/aws4_request, "
        "SignedHeaders=host, Signature=any",
    }
    asked = urllib.request.Request(path, content, headers, method=method)
    urllib.request.urlopen(asked, timeout=20).close()


def names_in(store: Path) -> list[str]:
    files = [path for path in store.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return [path.relative_to(store).as_posix() for path in files]


def upload(store: Path, url: str) -> None:
    for name in names_in(store):
        change(url, name, (store / name).read_bytes())


def assert_same(url: str, store: Path) -> None:
    found, expected = open_store(url)[:], open_store(store)[:]
    np.testing.assert_array_equal(found.rows.tokens, expected.rows.tokens)
    for one, other in zip(found.teachers, expected.teachers, strict=True):
        for name in ("ids_PK", "logp_PK", "inclusion_PK", "tail_PT", "gold_logp_P"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def shards_seen() -> list[str]:
    return [path for path in Proxy.seen if "/c." in path]


def test_a_remote_store_reads_as_the_local_one_and_each_file_is_fetched_once(
    uploaded, built, tmp_path
):
    open_store(uploaded)
    assert shards_seen() == []  # opening fetches no shard
    assert_same(uploaded, built.path)
    fetched = shards_seen()
    assert len(fetched) == len(set(fetched)) == sum(1 for _ in built.path.rglob("c.*"))
    exported = CliRunner().invoke(
        store_cli, ["export", uploaded, "--to", "parquet", "--out", str(tmp_path / "parquet")]
    )
    assert exported.exit_code == 0, exported.output
    assert_same(Path(uploaded), built.path)  # pathlib takes one of the slashes
    assert shards_seen() == fetched


def test_503s_cut_bodies_and_stalled_answers_are_tried_again(uploaded, built, monkeypatch):
    monkeypatch.setitem(remote._OPTIONS, "timeout", "1s")
    Proxy.faults += ["503", "cut", "stall", "503", "cut"] * 2
    assert_same(uploaded, built.path)
    assert Proxy.faults == []


def test_a_server_that_answers_nothing_but_errors_exits_with_6(uploaded, monkeypatch):
    monkeypatch.setattr(remote, "_TRIES", 1)
    Proxy.faults += ["503"] * 10_000
    with pytest.raises(ResourceError, match="cannot be reached") as caught:
        open_store(uploaded)
    assert caught.value.exit_code == 6
    Proxy.faults.clear()


def test_missing_and_changed_objects_are_refused(uploaded, built):
    name = "teacher1/certain/c.0.0.0"
    content = (built.path / name).read_bytes()
    flipped = bytearray(content)
    flipped[40] ^= 1
    change(uploaded, name, bytes(flipped))
    with pytest.raises(StoreError, match="not the file of its commit record"):
        open_store(uploaded)[0]
    change(uploaded, name, None)
    with pytest.raises(StoreError, match="incomplete: teacher1"):
        open_store(uploaded)
    change(uploaded, name, content)
    assert_same(uploaded, built.path)
    with pytest.raises(StoreError, match="no such store"):
        open_store(uploaded + "-not")


def test_another_store_at_the_same_url_is_not_mixed_with_what_was_fetched(
    uploaded, built, tmp_path
):
    assert_same(uploaded, built.path)
    other = tmp_path / "other"
    build(out=other, **{**built.settings, "teacher2": None, "seed": 5})
    for name in names_in(built.path):
        change(uploaded, name, None)
    upload(other, uploaded)
    assert_same(uploaded, other)


def test_what_was_damaged_here_is_fetched_again(uploaded, built, tmp_path):
    assert_same(uploaded, built.path)
    (path,) = (tmp_path / "home").rglob("teacher1/certain/c.0.0.0")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_same(uploaded, built.path)
    assert path.read_bytes() == content


def test_spawned_data_workers_read_it_and_forked_ones_say_why_not(uploaded, built):
    dataset = as_torch_dataset(uploaded, 2.0)
    options = {"num_workers": 1, "collate_fn": dataset.collate, "batch_size": 4}
    loader = torch.utils.data.DataLoader(dataset, multiprocessing_context="spawn", **options)
    expected = as_torch_dataset(built.path, 2.0)
    found = next(iter(loader))
    for name, values in dataset.collate([expected[row] for row in range(4)]).items():
        np.testing.assert_array_equal(found[name], values)
    shutil.rmtree(os.environ["LOGITCACHE_HOME"])
    dataset = as_torch_dataset(uploaded, 2.0)
    loader = torch.utils.data.DataLoader(dataset, multiprocessing_context="fork", **options)
    with pytest.raises((ResourceError, StoreError, RuntimeError), match="spawn"):
        next(iter(loader))


def test_training_reads_a_remote_store(uploaded, built, tmp_path):
    from distill.cli import cli

    out = tmp_path / "out"
    words = ["train", "--store", uploaded, "--student", built.settings["teacher1"], "--out", out]
    result = CliRunner().invoke(cli, [*map(str, words), "--set", "max_steps=2", "--quiet"])
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").is_file()


@pytest.fixture
def url(server, tmp_path, monkeypatch, request):
    """Where nothing is yet, and an empty folder for what goes there."""
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home"))
    Proxy.faults.clear()
    Proxy.seen.clear()
    return f"s3://bucket/{request.node.name}/store"


def objects(url: str) -> dict[str, bytes]:
    """Everything below a URL."""
    names = remote.list_objects(url)
    return remote._fetch(url, sorted(names))


def files(store: Path) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in sorted(names_in(store))}


def build_command(url: str, settings: dict, *more: str) -> object:
    words = ["build", "--teacher1", settings["teacher1"], "--data", *settings["data"]]
    words += ["--seq-len", settings["seq_len"], "--set", "device=cpu", "--out", url, *more]
    return CliRunner().invoke(store_cli, [str(word) for word in words])


def test_a_build_at_a_url_is_the_same_store_and_is_left_alone_when_finished(url, built):
    second = ["--teacher2", str(built.settings["teacher2"])]
    first = build_command(url, built.settings, "--json")  # teacher 1, then the second one later
    assert first.exit_code == 0, first.output
    both = build_command(url, built.settings, *second, "--json")
    assert both.exit_code == 0, both.output
    assert objects(url) == files(built.path)
    fetched = shards_seen()
    assert_same(url, built.path)
    assert shards_seen() == fetched  # what was built here is not fetched
    again = build_command(url, built.settings, *second)
    assert again.exit_code == 0
    assert f"{url}: already complete; nothing was changed" in again.output
    other = build_command(url, built.settings, *second, "--set", "seed=5")
    assert other.exit_code == 2
    assert f"{url}: holds another build" in other.output
    assert objects(url) == files(built.path)
    fresh = build_command(url, built.settings, "--set", "seed=5", "--fresh")
    assert fresh.exit_code == 0, fresh.output
    assert set(objects(url)) == {n for n in files(built.path) if "teacher2" not in n}
    record = remote._fetch(url.rpartition("/")[0], ["store.run.json"])["store.run.json"]
    assert b'"seed": 5' in record


def test_a_build_that_dies_goes_on_to_the_same_objects(url, built, monkeypatch, tmp_path):
    """One change in 17, here or there, fails, each in a run of its own, until one gets through."""
    settings = {**built.settings, "teacher2": None}
    expected = files(build(out=tmp_path / "expected", **settings).path)
    for number in itertools.count(1, 17):
        monkeypatch.setattr(remote_files, "_passed", itertools.count(1))
        monkeypatch.setenv(FAILPOINT, f"{number}:EIO")
        place, failed = f"{url}-{number}", False
        try:
            build(out=place, **settings)
        except (ResourceError, OSError):
            failed = True
        monkeypatch.delenv(FAILPOINT)
        if failed:
            with contextlib.suppress(StoreError):
                open_store(place)
                assert objects(place) == expected  # all but the run record is there
            build(out=place, **settings)
        assert objects(place) == expected, f"failpoint {number}"
        if not failed:
            break
    assert number > 80


def test_builders_of_other_machines_share_a_url(url, built, tmp_path, monkeypatch):
    for index in (1, 0):
        monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / f"home{index}"))
        build(out=url, shard=f"{index}/2", **built.settings)
    assert objects(url) == files(built.path)
    shutil.rmtree(tmp_path / "home0")
    monkeypatch.setenv("LOGITCACHE_HOME", str(tmp_path / "home0"))
    build(out=url, shard="0/2", **built.settings)  # on a new machine: all is there
    assert list((tmp_path / "home0").rglob("c.*")) == []


def test_info_and_verify_look_at_what_is_at_the_url(uploaded, built):
    assert_same(uploaded, built.path)  # a good copy is here
    info = CliRunner().invoke(store_cli, ["info", uploaded, "--json"])
    local = CliRunner().invoke(store_cli, ["info", str(built.path), "--json"])
    found, expected = json.loads(info.output), json.loads(local.output)
    assert {**found, "store": ""} == {**expected, "store": ""}
    assert found["store"] == uploaded
    whole = CliRunner().invoke(store_cli, ["verify", uploaded])
    assert whole.exit_code == 0, whole.output
    name = "teacher1/certain/c.0.0.0"
    content = (built.path / name).read_bytes()
    change(uploaded, name, content[:-1] + bytes([content[-1] ^ 1]))
    change(uploaded, "teacher1/other", b"x")
    damaged = CliRunner().invoke(store_cli, ["verify", uploaded])
    assert damaged.exit_code == 4
    assert f"{name}: its bytes are not those that were written" in damaged.output
    assert "teacher1/other: is no file of a store" in damaged.output
    refused = CliRunner().invoke(store_cli, ["repair", uploaded])
    assert refused.exit_code == 2
    assert "delete the objects that verify names" in refused.output
    change(uploaded, name, None)
    change(uploaded, "teacher1/other", None)
    build(out=uploaded, **built.settings)
    assert CliRunner().invoke(store_cli, ["verify", uploaded]).exit_code == 0


def test_inspect_reads_a_remote_store(uploaded, built, tmp_path):
    documents = []
    for store in (built.path, uploaded):
        page = str(tmp_path / "page.html")
        words = ["inspect", str(store), "--html", page, "--json"]
        result = CliRunner().invoke(store_cli, words)
        assert result.exit_code == 0, result.output
        documents.append(json.loads(result.stdout))
        assert documents[-1].pop("store") == str(store)
        assert f"<title>Teachers of {store}</title>" in Path(page).read_text(encoding="utf-8")
    assert documents[0] == documents[1]


def test_a_build_refuses_a_url_that_holds_other_things(url, built):
    change(url, "notes.txt", b"mine")
    refused = build_command(url, built.settings)
    assert refused.exit_code == 2
    assert f"{url}: expected an empty folder or a store, found other files" in refused.output


def test_without_obstore_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(ResourceError, match="obstore") as caught:
        open_store("s3://bucket/nowhere")
    assert "logitcache[remote]" in caught.value.hint


def test_stores_of_one_name_have_folders_and_locks_of_their_own():
    one, other = (remote.cache_folder(f"s3://bucket/{part}/store.zarr") for part in "ab")
    for suffix in (".lock", ".locks", ".old"):
        assert one.with_suffix(suffix) != other.with_suffix(suffix)


def test_paths_of_this_machine_are_no_urls():
    for path in ("store", "/a/store", Path("s3/store"), "./s3:/store"):
        assert remote.remote_url(path) is None
    for path in ("s3://bucket/a/store/", Path("s3://bucket/a/store")):
        assert remote.remote_url(path) == "s3://bucket/a/store"
