"""From a name in the table of official weights to a verified file on this machine.

A file is looked for in the folder `REPLKNET_WEIGHTS`, then in torch hub's cache (`checkpoints/replknet` in it), then
downloaded there. Bytes in transit stand in `NAME.part` until they are whole and verified; an interrupted transfer goes
on where it stopped. Of several processes one downloads and the others wait for it.
"""

import contextlib
import hashlib
import html.parser
import http.client
import http.cookiejar
import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from timm.models import PretrainedCfg, get_pretrained_cfg
from tqdm.auto import tqdm

from replknet import _env
from replknet._errors import RunError, UsageError
from replknet.models.weights import WEIGHTS, Source, Weights, find_weights

TIMEOUT = 30.0
"""Seconds without a byte after which a transfer counts as broken off."""
ATTEMPTS = 4
"""Tries of one URL that bring no new byte before the next URL is tried."""
BACKOFF = 1.0
"""Seconds before the second try; doubled with every further one."""

_CHUNK = 1 << 20
_MAX_PAGE = 1 << 20
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
_log = logging.getLogger(__name__)


class _RefusedError(Exception):
    """This URL will not give the file, however often it is asked."""


class _BrokenError(Exception):
    """The transfer stopped and may go on at another try."""


def fetch_weights(weights: Weights | str, *, progress: bool | None = None) -> Path:
    """Find or download the file of one set of official weights.

    Args:
        weights: an entry of `replknet.models.weights.WEIGHTS`, or its name.
        progress: show a bar on standard error; None: where that is a terminal.

    Returns:
        Path of a whole file whose SHA-256 was checked where the table knows it.

    Raises:
        UsageError: unknown name, or `REPLKNET_WEIGHTS` is no folder.
        RunError: a file found is damaged, it cannot be saved, or no source could be reached; then the message holds
            every URL with its reason, the file name, and the folder to put it in by hand.
    """
    entry = find_weights(weights) if isinstance(weights, str) else weights
    if found := _find_local(entry):
        return found
    reasons = []
    for source in entry.sources:
        target = cache_folder() / source.file_name
        try:
            path = _download(source, target, progress)
            _discard_other_parts(entry, source)
            return path
        except _RefusedError as refusal:
            reasons.append(f"{source.url} ({refusal})")
            _log.info("%s", reasons[-1])
        except OSError as error:  # those of the network are refusals by now
            raise RunError(
                f"the weights {entry.name} cannot be saved as {target}: {error.strerror or error}. Make room, choose "
                "another cache folder by the environment variable TORCH_HOME, or name a folder that holds "
                f"{source.file_name} by REPLKNET_WEIGHTS"
            ) from error
    names = " or ".join(source.file_name for source in entry.sources)
    raise RunError(
        f"the weights {entry.name} could not be downloaded: {'; '.join(reasons)}. Download one of these by hand, "
        f"save it as {names} in {cache_folder()} or in a folder named by the environment variable REPLKNET_WEIGHTS"
    )


def weights_in_folder(folder: str | Path, name: str) -> Path:
    """The official file of the weights `name` in a folder of files that were put there by hand.

    Args:
        folder: an existing folder.
        name: `MODEL.TAG`, or `MODEL` for its default weights.

    Raises:
        UsageError: the folder does not hold it, or no official weights have this name.
        RunError: it is damaged.
    """
    folder = Path(folder).expanduser()
    if name.partition(".")[0] not in {entry.model for entry in WEIGHTS.values() if entry.task == "classification"}:
        raise UsageError(f"{folder} is a folder; give a checkpoint file inside it")
    entry = find_weights(name)
    if found := _find_in(folder, entry):
        return found
    names = [*(source.file_name for source in entry.sources), f"{entry.name}.safetensors"]
    raise UsageError(
        f"the folder {folder} does not hold the weights {entry.name}, which are called {' or '.join(names)}; "
        "give a checkpoint file, or put one there under such a name"
    )


def cache_folder() -> Path:
    """Folder of downloaded weights inside torch hub's cache; not created here."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "replknet"


def verify_file(path: Path, source: Source) -> None:
    """Raise RunError with the reason unless `path` can be the file that `source` describes."""
    if reason := _damage(path, source):
        raise RunError(f"{path} is not the file of the official release: {reason}. Remove or replace it")


def local_pretrained_cfg(model: str, pretrained_cfg: PretrainedCfg) -> dict[str, Any]:
    """Overlay for timm that points a pretrained configuration at the local file, which is downloaded when needed.

    Args:
        model: the architecture, `replknet_31b`.
        pretrained_cfg: as timm resolved it.

    Returns:
        `{"file": path}`, or `{}` where the configuration brings its own weights (`hf-hub:`, `local-dir:`, a file, a
        state dict, or a URL that is not the table's).
    """
    name = f"{model}.{pretrained_cfg.tag}"
    entry = WEIGHTS.get(name)
    if pretrained_cfg.source in ("hf-hub", "local-dir") or pretrained_cfg.file or pretrained_cfg.state_dict:
        return {}
    if entry is None or not pretrained_cfg.url:
        return {}
    registered = get_pretrained_cfg(name)
    known = {entry.sources[0].url, registered.url if registered else None}
    return {"file": str(fetch_weights(entry))} if pretrained_cfg.url in known else {}


def _find_local(entry: Weights) -> Path | None:
    folders = [cache_folder()]
    if by_hand := _env.weights_dir():
        if not by_hand.is_dir():
            raise UsageError(f"REPLKNET_WEIGHTS names {by_hand}, which is not a folder")
        folders.insert(0, by_hand)
    for folder in folders:
        if found := _find_in(folder, entry):
            return found
    return None


def _find_in(folder: Path, entry: Weights) -> Path | None:
    for source in entry.sources:
        if (path := folder / source.file_name).is_file():
            verify_file(path, source)
            return path
    path = folder / f"{entry.name}.safetensors"
    return path if path.is_file() else None


def _damage(path: Path, source: Source) -> str | None:
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        return f"it has {size} bytes instead of {source.size}"
    with path.open("rb") as file:
        head = file.read(512)
    if _is_page(head):
        return "it is a web page"
    if not head.startswith((b"PK\x03\x04", b"\x80")):
        return "it is not a PyTorch checkpoint"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "its end is missing"
    if source.sha256_prefix is not None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(source.sha256_prefix):
            return f"its SHA-256 is {digest[:16]}..., expected {source.sha256_prefix}..."
    return None


def _is_page(head: bytes) -> bool:
    return head.lstrip()[:15].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--"))


def _download(source: Source, target: Path, progress: bool | None) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with FileLock(target.with_name(target.name + ".lock")):
        if target.is_file():  # another process was faster
            verify_file(target, source)
            return target
        failures = 0
        while True:
            before = _part_size(part)
            try:
                _transfer(source, part, progress)
                break
            except _BrokenError as stop:
                failures = 0 if _part_size(part) > before else failures + 1
                if failures >= ATTEMPTS:
                    _resume_point(source, part)  # a part that no later run could go on with is removed
                    raise _RefusedError(str(stop)) from stop
                _log.warning("%s: %s; trying again", source.url, stop)
                time.sleep(BACKOFF * 2**failures)
        os.replace(part, target)
        _discard(part)
    return target


@dataclass(frozen=True)
class _PartState:
    """What is known of a part: written beside it, so that another process can go on with it."""

    url: str
    validator: str | None
    total: int | None

    def save(self, part: Path) -> None:
        _state(part).write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(part: Path) -> "_PartState | None":
        try:
            return _PartState(**json.loads(_state(part).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _part_size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _discard_other_parts(entry: Weights, arrived: Source) -> None:
    """Remove what sources that were given up have left, unless another process is at it."""
    for source in entry.sources:
        if source != arrived:
            target = cache_folder() / source.file_name
            with contextlib.suppress(Timeout), FileLock(target.with_name(target.name + ".lock"), timeout=0):
                _discard(target.with_name(target.name + ".part"))


def _transfer(source: Source, part: Path, progress: bool | None) -> None:
    """Bring `part` from what it holds to the whole, verified file."""
    offset, headers = _resume_point(source, part)
    try:
        response = _open(source.url, headers)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the part is no beginning of what the server has now
                _discard(part)
            if error.code in (408, 416, 425, 429) or error.code >= 500:
                raise _BrokenError(f"HTTP status {error.code}") from error
            raise _RefusedError(f"HTTP status {error.code} {error.reason}".strip()) from error
    except _NETWORK_ERRORS as error:
        raise _BrokenError(_reason(error)) from error
    with response:
        offset = _accept(response, source, part, offset)
        _receive(response, source, part, offset, progress)
    _finish(source, part, resumed=offset > 0)


def _resume_point(source: Source, part: Path) -> tuple[int, dict[str, str]]:
    offset, known = _part_size(part), _PartState.load(part)
    # Without a validator or a hash nothing could tell a part of another version: start over.
    if not offset or not known or known.url != source.url or not (known.validator or source.sha256_prefix):
        _discard(part)
        return 0, {}
    headers = {"Range": f"bytes={offset}-"}
    if known.validator:
        headers["If-Range"] = known.validator
    return offset, headers


def _accept(response: Any, source: Source, part: Path, offset: int) -> int:
    """Check the head of a response; return the offset at which its body starts."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _RefusedError(f"the server encodes the file as {response.headers['Content-Encoding']}")
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if response.status == 206:
        first, _, rest = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")
        if first != str(offset):
            _discard(part)
            raise _BrokenError("the server answered with another range than the one asked for")
        size = rest.partition("/")[2]
        total = int(size) if size.isdigit() else None
    else:
        offset = 0
        _discard(part)
    if source.size is not None and total is not None and total != source.size:
        _discard(part)
        raise _RefusedError(f"the server offers {total} bytes, the file has {source.size}")
    etag = response.headers.get("ETag")
    strong = etag if etag and not etag.startswith("W/") else None
    _PartState(source.url, strong or response.headers.get("Last-Modified"), total).save(part)
    return offset


def _receive(response: Any, source: Source, part: Path, offset: int, progress: bool | None) -> None:
    known = _PartState.load(part)
    total = known.total if known else None
    hidden = None if progress is None else not progress
    bar = tqdm(
        total=total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024, desc=source.file_name, disable=hidden
    )
    with bar, part.open("ab" if offset else "wb") as file:
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except _NETWORK_ERRORS as error:
                raise _BrokenError(f"broke off after {file.tell()} bytes: {_reason(error)}") from error
            if not chunk:
                break
            file.write(chunk)
            bar.update(len(chunk))
            if total is not None and file.tell() > total:
                break
        size = file.tell()
    if total is not None and size < total:
        raise _BrokenError(f"broke off after {size} of {total} bytes")
    if total is not None and size > total:
        _discard(part)
        raise _RefusedError(f"sent more than the {total} bytes it announced")


def _finish(source: Source, part: Path, *, resumed: bool) -> None:
    if reason := _damage(part, source):
        _discard(part)
        # A part may have been of another version: its file is fetched once more as a whole before the URL is given up.
        raise (_BrokenError if resumed else _RefusedError)(f"what arrived is not the file: {reason}")


def _reason(error: BaseException) -> str:
    cause = getattr(error, "reason", None) or error
    return str(cause) or type(cause).__name__


def _open(url: str, headers: dict[str, str]) -> Any:
    """Open a URL; a confirmation page as Google Drive shows before large files is answered once."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    headers = {"User-Agent": "replknet", "Accept-Encoding": "identity", **headers}
    for confirm in (True, False):
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
        if not response.headers.get_content_type().endswith(("/html", "/xhtml+xml")):
            return response
        with response:
            page = _Page(response.read(_MAX_PAGE).decode("utf-8", "replace"), response.url)
        if not confirm or not page.form or not _same_site(page.form, url):
            break
        url = page.form
    raise _RefusedError(f"the server answered with a web page, {page.title!r}, instead of the file")


def _same_site(url: str, origin: str) -> bool:
    new, old = urllib.parse.urlsplit(url), urllib.parse.urlsplit(origin)
    # Drive's pages stand at drive.google.com, its files at drive.usercontent.google.com.
    google = all((part.hostname or "").endswith(".google.com") and part.scheme == "https" for part in (new, old))
    return google or (new.scheme, new.netloc) == (old.scheme, old.netloc)


class _Page(html.parser.HTMLParser):
    """Title of a page, and the address its download form leads to."""

    def __init__(self, text: str, url: str) -> None:
        super().__init__()
        self.title = ""
        self.form: str | None = None
        self._action: str | None = None
        self._fields: dict[str, str] = {}
        self._in_title = False
        self.feed(text)
        self.title = " ".join(self.title.split())[:80]
        if self._action is not None and "id" in self._fields:
            query = urllib.parse.urlencode(self._fields)
            self.form = urllib.parse.urljoin(url, self._action).partition("?")[0] + "?" + query

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag == "title":
            self._in_title = True
        elif tag == "form" and "download" in values.get("id", "") + values.get("action", ""):
            self._action = values.get("action", "")
        elif tag == "input" and self._action is not None and values.get("name"):
            self._fields[values["name"]] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data
