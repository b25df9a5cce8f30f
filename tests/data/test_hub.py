"""The hub against a local server that limits rates, fails and hangs up: each document comes once."""

import gzip
import json
import multiprocessing
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from lrpretrain.config import DataConfig
from lrpretrain.data import hub
from lrpretrain.errors import DataError


class FakeHub:
    """A data set nobody/c4 behind the two addresses of the hub that are used, with faults on demand.

    `faults[name]` is a list that requests for a file (or for "tree") use up: a status, a pair of a
    status and headers, "drop", which closes the connection in the middle of the answer, or "short",
    which ends in good order with half of it.
    """

    def __init__(self, files):
        self.files, self.faults, self.requests, self.page = files, {}, Counter(), 3
        self.ranges, self.gone = [], False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                fake.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def answer(self, request):
        if self.gone:
            request.close_connection = True
            return
        address = urlsplit(request.path)
        is_tree = address.path == "/api/datasets/nobody/c4/tree/main/en"
        name = "tree" if is_tree else address.path.removeprefix("/datasets/nobody/c4/resolve/main/en/")
        self.requests[name] += 1
        fault = self.faults[name].pop(0) if self.faults.get(name) else None
        if fault not in (None, "drop", "short"):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.send(request, status, headers, b"")
        elif is_tree:
            self.send(request, 200, *self.tree(parse_qs(address.query)), fault)
        elif name in self.files:
            self.send_file(request, self.files[name], fault)
        else:
            self.send(request, 404, {}, b"")

    def tree(self, query):
        first = int(query.get("cursor", ["0"])[0])
        entries = [
            {"type": "file", "oid": "0", "path": f"en/{name}", "size": len(content)}
            for name, content in self.files.items()
        ]
        entries.append({"type": "directory", "oid": "0", "path": "en/c4-train-more", "size": 0})
        headers = {}
        if first + self.page < len(entries):
            # As behind a mirror: the link leads to another host.
            link = f"https://hub.invalid/api/datasets/nobody/c4/tree/main/en?cursor={first + self.page}"
            headers["Link"] = f'<{link}>; rel="next"'
        return headers, json.dumps(entries[first : first + self.page]).encode()

    def send_file(self, request, content, fault):
        wanted = request.headers.get("Range")
        if not wanted:
            return self.send(request, 200, {}, content, fault)
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.ranges.append(start)
        span = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(request, 206, {"Content-Range": span}, content[start:], fault)

    def send(self, request, status, headers, body, fault=None):
        sent = body[: len(body) // 2] if fault else body
        request.send_response(status)
        for key, value in {**headers, "Content-Length": len(sent if fault == "short" else body)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        request.wfile.write(sent)
        request.close_connection = request.close_connection or fault == "drop"

    def close(self):
        self.gone = True  # also for the connections that are kept alive
        self.server.shutdown()
        self.server.server_close()


def texts(shard, n=50):
    return [f"shard {shard} document {i} " + "x" * (i % 7) for i in range(n)]


def packed(lines):
    return gzip.compress("".join(json.dumps({"text": line}) + "\n" for line in lines).encode(), mtime=0)


TRAIN = [f"c4-train.{i:05d}-of-00004.json.gz" for i in range(4)]
VALIDATION = ["c4-validation.00000-of-00001.json.gz"]


@pytest.fixture
def fake(monkeypatch):
    files = {name: packed(texts(i)) for i, name in reversed(list(enumerate(TRAIN)))}
    fake = FakeHub({**files, VALIDATION[0]: packed(texts("v")), "README.md": b"# C4"})
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setattr(hub.random, "uniform", lambda low, high: 0.02)
    yield fake
    fake.close()


@pytest.fixture
def data(tmp_path):
    return DataConfig(source="hub", path="nobody/c4", cache_dir=str(tmp_path / "cache"), hub_patience_s=5)


def test_names_are_sorted_and_of_the_split(fake, data):
    assert hub.HubShards(data, "train").names == TRAIN
    assert hub.HubShards(data, "validation").names == VALIDATION
    assert fake.requests["tree"] == 3, "three pages, listed once for both splits"


def test_a_shard_is_downloaded_once(fake, data):
    source = hub.HubShards(data, "train")
    assert list(source.read(2)) == texts(2)
    assert list(source.read(2, start=48)) == texts(2)[48:]
    assert list(hub.HubShards(data, "train").read(2)) == texts(2)
    assert fake.requests[TRAIN[2]] == 1
    assert fake.requests[TRAIN[1]] == 0


def test_every_document_once_through_all_faults(fake, data):
    fake.faults = {
        "tree": [503, "drop", 429],
        TRAIN[0]: [500, 502, "drop", 504],
        TRAIN[1]: ["drop", "drop", (429, {"Retry-After": "0"}), "drop", 408],
        VALIDATION[0]: ["drop"],
    }
    source = hub.HubShards(data, "train")
    assert [list(source.read(i)) for i in range(4)] == [texts(i) for i in range(4)]
    assert list(hub.HubShards(data, "validation").read(0)) == texts("v")
    assert not any(fake.faults.values())
    assert len(fake.ranges) >= 4, "what was dropped went on where it broke off"
    assert all(start > 0 for start in fake.ranges)


def test_a_server_without_ranges_starts_the_file_again(fake, data, monkeypatch):
    monkeypatch.setattr(
        fake, "send_file", lambda request, content, fault: fake.send(request, 200, {}, content, fault)
    )
    fake.faults = {TRAIN[0]: ["drop", "drop"]}
    assert list(hub.HubShards(data, "train").read(0)) == texts(0)
    assert fake.requests[TRAIN[0]] == 3


def test_a_short_answer_that_ends_in_good_order_is_not_a_shard(fake, data):
    fake.faults = {TRAIN[0]: ["short"]}
    assert list(hub.HubShards(data, "train").read(0)) == texts(0)
    assert fake.requests[TRAIN[0]] == 2


@pytest.mark.parametrize(
    "headers",
    [{"Retry-After": "1"}, {"RateLimit": '"resolvers";r=0;t=1'}],
    ids=["Retry-After", "RateLimit"],
)
def test_waits_as_long_as_the_hub_asks(fake, data, headers):
    source = hub.HubShards(data, "train")
    fake.faults = {TRAIN[0]: [(429, headers)]}
    start = time.monotonic()
    assert list(source.read(0)) == texts(0)
    assert 1 <= time.monotonic() - start < 3


def test_retry_after_may_be_a_date():
    assert hub._retry_after_s({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert hub._retry_after_s({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT"}) > 1e9


def test_a_server_that_is_gone(fake, data):
    data.hub_patience_s = 0.5
    source = hub.HubShards(data, "train")
    fake.close()
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"data\.hub_patience_s=0\.5.*lrpretrain download.*data\.source=files"
    ):
        source.read(0)
    assert time.monotonic() - start < 2


def test_patience_counts_from_the_last_byte(fake, data):
    """Half of the rest comes with each of many drops: together longer than the patience, none alone."""
    data.hub_patience_s = 0.6
    source = hub.HubShards(data, "train")
    fake.faults = {TRAIN[0]: [503, 503, 503, "drop"] * 8}
    start = time.monotonic()
    assert list(source.read(0)) == texts(0)
    assert time.monotonic() - start > data.hub_patience_s


def test_asked_to_wait_longer_than_the_patience(fake, data):
    source = hub.HubShards(data, "train")
    fake.faults = {TRAIN[0]: [(429, {"Retry-After": "3600"})]}
    start = time.monotonic()
    with pytest.raises(DataError, match="429"):
        source.read(0)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "HF_TOKEN"), (403, "terms"), (404, "data.subset"), (416, "files")]
)
def test_a_refusal_is_not_repeated(fake, data, status, remedy):
    source = hub.HubShards(data, "train")
    fake.faults = {TRAIN[0]: [status] * 9}
    with pytest.raises(DataError, match=rf"{TRAIN[0]}.*{status}.*{remedy}"):
        source.read(0)
    assert fake.requests[TRAIN[0]] == 1


def test_unknown_data_set_and_split(fake, data):
    with pytest.raises(DataError, match="'test' in its name"):
        hub.HubShards(data, "test")
    data.subset = "xx"
    with pytest.raises(DataError, match=r"404.*Check data\.path"):
        hub.HubShards(data, "train")


def test_a_shard_that_grew_on_the_hub(fake, data):
    source = hub.HubShards(data, "train")
    fake.files[TRAIN[0]] += b"more"
    with pytest.raises(DataError, match="the data set has changed"):
        source.read(0)


def test_offline(fake, data, monkeypatch):
    assert list(hub.HubShards(data, "train").read(1)) == texts(1)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = hub.HubShards(data, "train")
    assert list(source.read(1)) == texts(1)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set"):
        source.read(0)


def read_in_process(data):
    return list(hub.HubShards(data, "train").read(0))


def test_processes_download_a_shard_once(fake, data):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(read_in_process, [data] * 3, chunksize=1) == [texts(0)] * 3
    assert fake.requests[TRAIN[0]] == 1
    assert fake.requests["tree"] == 3


def test_threads_download_a_shard_once(fake, data):
    source, results = hub.HubShards(data, "train"), []
    threads = [
        threading.Thread(target=lambda i=i: results.append(list(source.read(i % 2)))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted([texts(0), texts(1)] * 4)
    assert (fake.requests[TRAIN[0]], fake.requests[TRAIN[1]]) == (1, 1)


def test_download_to_a_plain_folder(fake, tmp_path):
    folder = tmp_path / "c4"
    paths = hub.download("nobody/c4", "en", range(1, 3), folder, patience_s=5)
    assert [path.name for path in paths] == [*TRAIN[1:3], *VALIDATION]
    assert [path.read_bytes() for path in paths] == [fake.files[path.name] for path in paths]
    assert sorted(folder.glob("*")) == sorted([*paths, folder / ".partial"])
    again = hub.download("nobody/c4", "en", range(4), folder, validation=False, patience_s=5)
    assert [path.name for path in again] == TRAIN
    assert [fake.requests[name] for name in [*TRAIN, *VALIDATION]] == [1] * 5


def test_download_goes_on_where_it_was_stopped(fake, tmp_path):
    fake.faults = {TRAIN[0]: ["drop", 404]}
    with pytest.raises(DataError, match="404"):
        hub.download("nobody/c4", "en", range(1), tmp_path, patience_s=5)
    assert not (tmp_path / TRAIN[0]).exists()
    hub.download("nobody/c4", "en", range(1), tmp_path, patience_s=5)
    assert (tmp_path / TRAIN[0]).read_bytes() == fake.files[TRAIN[0]]
    assert len(fake.ranges) == 1
    (tmp_path / TRAIN[0]).write_bytes(b"cut short")
    hub.download("nobody/c4", "en", range(1), tmp_path, patience_s=5)
    assert (tmp_path / TRAIN[0]).read_bytes() == fake.files[TRAIN[0]]


def test_download_beyond_the_last_shard(fake, tmp_path):
    with pytest.raises(DataError, match=r"shards=2:9.*has 4 shards of train"):
        hub.download("nobody/c4", "en", range(2, 9), tmp_path)
