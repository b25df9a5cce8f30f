"""Shards of a data set of the Hugging Face hub, each downloaded once into a local folder.

The hub limits rates and drops connections, so every request is tried again, from the byte where
it broke off, until nothing has arrived for `data.hub_patience_s`. A shard counts as there once it
has the size that the hub lists. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to
huggingface_hub.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

from lrpretrain.config import DataConfig
from lrpretrain.data.sources import Document, FileShards, cache_dir
from lrpretrain.errors import DataError

DATASET = "allenai/c4"
SUFFIXES = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
REQUEST_TIMEOUT_S = 30.0
LONGEST_WAIT_S = 60.0
REMEDY = (
    "Fetch the shards where the hub can be reached (`lrpretrain download --shards 0:64 DIR`) and set "
    "data.source=files and data.path=DIR; or set HF_HUB_OFFLINE=1 if data.cache_dir holds them all"
)

T = TypeVar("T")
_log = logging.getLogger(__name__)


class HubShards:
    """The shards of one split of a hub data set (data.path, data.subset): a `Source`.

    Their list is asked for once and kept in the cache beside them: it is part of the run's
    identity, and a run whose shards are all there needs no network. Raises DataError where the
    hub cannot be reached for data.hub_patience_s, and at once where it refuses.
    """

    def __init__(self, data: DataConfig, split: str):
        self._dataset, self._subset = data.path or DATASET, data.subset
        self._patience_s = data.hub_patience_s
        self._folder = cache_dir(data) / "hub" / self._dataset.replace("/", "--") / self._subset
        self._sizes = self._listing()
        self.names = _of_split(self._sizes, split, self._dataset, self._subset)

    def read(self, shard: int, start: int = 0) -> Iterator[Document]:
        """Download the shard if it is not in the cache, and yield its texts from document `start`."""
        name = self.names[shard]
        url = _file_url(self._dataset, self._subset, name)
        path = _fetch(url, self._folder / name, self._sizes[name], self._patience_s)
        return FileShards([path]).read(0, start)

    def key(self, shard: int) -> str:
        """Return which file it is, and its size."""
        name = self.names[shard]
        return f"hub:{self._dataset}/{self._subset}/{name}:{self._sizes[name]}"

    def _listing(self) -> dict[str, int]:
        kept = self._folder / "listing.json"
        with _lock(kept):
            if not kept.exists():
                sizes = _list(self._dataset, self._subset, self._patience_s)
                part = _part(kept)
                part.write_text(json.dumps(sizes))
                part.replace(kept)
            listing: dict[str, int] = json.loads(kept.read_text())
        return listing


def download(
    dataset: str,
    subset: str,
    shards: range,
    folder: Path,
    *,
    split: str = "train",
    validation: bool = True,
    patience_s: float = 600.0,
) -> list[Path]:
    """Download shards into a plain folder for data.source=files, and return their paths.

    With `validation`, all validation shards come as well. What is complete is skipped and what is
    not goes on where it stopped. Raises DataError as `HubShards` does, and for shards beyond the last.
    """
    sizes = _list(dataset, subset, patience_s)
    names = _of_split(sizes, split, dataset, subset)
    if not 0 <= shards.start < shards.stop <= len(names):
        raise DataError(
            f"shards={shards.start}:{shards.stop}: {dataset}/{subset} has {len(names)} shards of {split}. "
            f"Choose a range within 0:{len(names)}."
        )
    names = names[shards.start : shards.stop : shards.step]
    if validation and split != "validation":
        names += _of_split(sizes, "validation", dataset, subset)
    paths = []
    for i, name in enumerate(names):
        _log.info("%d/%d: %s (%.0f MB)", i + 1, len(names), name, sizes[name] / 1e6)
        paths.append(_fetch(_file_url(dataset, subset, name), folder / name, sizes[name], patience_s))
    return paths


def _of_split(sizes: dict[str, int], split: str, dataset: str, subset: str) -> list[str]:
    names = sorted(name for name in sizes if split in name and name.endswith(SUFFIXES))
    if not names:
        raise DataError(
            f"data.path={dataset!r}, data.subset={subset!r}: no JSON-lines shard there has {split!r} in its "
            "name. Choose a data set with shards named as C4's, or set data.source=files."
        )
    return names


def _list(dataset: str, subset: str, patience_s: float) -> dict[str, int]:
    """Return the names and sizes in bytes of the files in a folder of a data set."""
    folder_url = f"{_endpoint()}/api/datasets/{quote(dataset)}/tree/main/{quote(subset)}"
    sizes: dict[str, int] = {}
    url: str | None = folder_url
    while url:
        entries, url = _persist(partial(_page, url, folder_url), folder_url, patience_s)
        sizes |= {Path(e["path"]).name: e["size"] for e in entries if e["type"] == "file"}
    return sizes


def _page(url: str, folder_url: str) -> tuple[list[dict[str, Any]], str | None]:
    with _get(url) as response:
        response.read()
        following = response.links.get("next", {}).get("url")
        # A mirror passes on links that lead to the hub itself: stay with the mirror.
        return response.json(), following and f"{folder_url}?{urlsplit(following).query}"


def _fetch(url: str, target: Path, size: int, patience_s: float) -> Path:
    """Download a file of `size` bytes to `target`, unless it is there; one process at a time does it."""
    if target.exists() and target.stat().st_size == size:
        return target
    part = _part(target)

    def arrived() -> int:
        return part.stat().st_size if part.exists() else 0

    with _lock(target):
        if not (target.exists() and target.stat().st_size == size):
            if arrived() > size:
                part.unlink()
            if arrived() < size or not part.exists():
                _persist(lambda: _receive(url, part, arrived(), size), url, patience_s, arrived)
            part.replace(target)
    return target


def _receive(url: str, part: Path, start: int, size: int) -> None:
    with _get(url, start) as response:
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        with part.open("ab" if goes_on else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
    arrived = part.stat().st_size
    if arrived > size:
        part.unlink()
        raise DataError(
            f"{url} is larger than the {size} bytes that the hub listed: the data set has changed. "
            "Delete listing.json beside the cached shards to start from the new one."
        )
    if arrived < size:
        raise ConnectionError(f"only {arrived} of {size} bytes arrived")


@contextmanager
def _get(url: str, start: int = 0) -> Iterator[Any]:
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with get_session().stream("GET", url, headers=headers, timeout=REQUEST_TIMEOUT_S) as response:
        response.raise_for_status()
        yield response


def _persist(attempt: Callable[[], T], url: str, patience_s: float, arrived: Callable[[], int] = int) -> T:
    """Repeat a request until it succeeds; `arrived` tells how many bytes of it are there.

    Raises DataError where repeating cannot help, or nothing has arrived for `patience_s`.
    """
    failures, most, since = 0, arrived(), time.monotonic()
    while True:
        try:
            return attempt()
        except (HTTPError, ConnectionError) as error:
            failure = error
        asked_s = _asked_to_wait_s(failure, url)
        if arrived() > most:
            failures, most, since = 0, arrived(), time.monotonic()
        wait_s = max(asked_s, random.uniform(0.5, 1) * min(2**failures, LONGEST_WAIT_S))
        reason = " ".join(str(failure).split()) or type(failure).__name__
        if time.monotonic() + wait_s - since > patience_s:
            raise DataError(
                f"{url}: {reason}. It was tried {failures + 1} times and the next try would exceed "
                f"data.hub_patience_s={patience_s:g}. {REMEDY}."
            ) from failure
        _log.warning("%s: %s; next try in %.1f s", url, reason, wait_s)
        time.sleep(wait_s)
        failures += 1


def _asked_to_wait_s(failure: Exception, url: str) -> float:
    """Return how long the hub asks to wait, 0 if it does not say; raise DataError where no wait can help."""
    if isinstance(failure, OfflineModeIsEnabled):
        raise DataError(f"{url} is not in data.cache_dir and HF_HUB_OFFLINE is set. {REMEDY}.") from failure
    response = getattr(failure, "response", None)
    if response is None:
        return 0.0
    status = response.status_code
    if status in (401, 403):
        remedy = "Accept the data set's terms on its page and set HF_TOKEN (or `hf auth login`)"
        raise DataError(f"{url}: the hub denies access ({status}). {remedy}, or choose another data.path.")
    if status == 404:
        raise DataError(
            f"{url}: the hub has no such file (404). Check data.path, data.subset and HF_ENDPOINT."
        )
    if status < 500 and status not in (408, 429):
        raise DataError(f"{url}: the hub refuses the request ({status}). {REMEDY}.")
    return _retry_after_s(response.headers)


def _retry_after_s(headers: Any) -> float:
    after = headers.get("Retry-After", "").strip()
    if after.isdigit():
        return float(after)
    if after:
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    # The hub's own form, as in `RateLimit: "resolvers";r=0;t=55`: none remaining, 55 s to go.
    spent = re.search(r"\br=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(spent[1]) if spent else 0.0


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _file_url(dataset: str, subset: str, name: str) -> str:
    return f"{_endpoint()}/datasets/{quote(dataset)}/resolve/main/{quote(f'{subset}/{name}')}"


def _part(target: Path) -> Path:
    """Return where a file grows: in a folder of its own, so that no glob for shards finds it."""
    return target.parent / ".partial" / target.name


def _lock(target: Path) -> FileLock:
    _part(target).parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{_part(target)}.lock")
