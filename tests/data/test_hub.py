"""The hub against a local server that limits rates, fails and hangs up: each document comes once."""

import multiprocessing
import threading
import time

import pytest
from hub_server import TRAIN, VALIDATION, FakeHub, c4_files, texts

from lrpretrain.config import DataConfig
from lrpretrain.data import hub
from lrpretrain.errors import DataError


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHub(c4_files())
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
