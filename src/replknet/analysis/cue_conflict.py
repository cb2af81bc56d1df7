"""Download of the 1280 cue-conflict pictures. Nothing in this package needs it: pictures put anywhere by hand do."""

import logging
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from replknet._errors import RunError, UsageError
from replknet.analysis.shape_bias import categories, find_stimuli

URL = "https://github.com/bethgelab/model-vs-human/releases/download/v0.1/cue-conflict.tar.gz"
N_IMAGES = 1280
LICENCE = (
    "The cue-conflict pictures are by Robert Geirhos, Patricia Rubisch, Claudio Michaelis, Matthias Bethge, Felix A. "
    "Wichmann and Wieland Brendel (ICLR 2019, arXiv:1811.12231), licensed under Creative Commons Attribution 4.0 "
    "(creativecommons.org/licenses/by/4.0): keep this notice with them and name the source where you show them."
)

_TIMEOUT = 30.0
_CHUNK = 1 << 18
_FILE_NAME = "cue-conflict.tar.gz"

logger = logging.getLogger(__name__)


def download_cue_conflict(folder: Path | str, *, url: str = URL, progress: bool = False) -> Path:
    """Fetch the pictures into `folder/cue-conflict`; what is there already is checked and kept.

    An interrupted transfer goes on where it stopped (`folder/cue-conflict.tar.gz.part`). The pictures appear at their
    place all at once, after the archive was found whole, with the licence notice beside them in `LICENCE.txt`.

    Args:
        folder: made if missing.
        url: of the archive.
        progress: show a bar on standard error.

    Returns:
        The folder for `find_stimuli`.

    Raises:
        UsageError: something else is in the way.
        RunError: the transfer failed, or what arrived is not the 1280 pictures; the message says what to do.
    """
    root = Path(folder).expanduser()
    target = root / "cue-conflict"
    if target.exists():
        _check(
            target, UsageError, f"{target} is there and is not the set of pictures; remove it or name another folder"
        )
        return target
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{_FILE_NAME}.part"
    resumed = part.exists()
    _transfer(url, part, progress)
    try:
        _unpack(part, target)
    except RunError:
        part.unlink(missing_ok=True)
        if not resumed:
            raise
        # The part may have been the beginning of something else.
        logger.warning("what an earlier transfer left does not fit; fetching the archive as a whole")
        _transfer(url, part, progress)
        _unpack(part, target)
    part.unlink()
    return target


def _transfer(url: str, part: Path, progress: bool) -> None:
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "replknet", **({"Range": f"bytes={start}-"} if start else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            if response.status != 206:
                start = 0
            total = start + int(response.headers.get("Content-Length") or 0)
            with (
                part.open("ab" if start else "wb") as file,
                tqdm(
                    total=total or None, initial=start, unit="B", unit_scale=True, desc=_FILE_NAME, disable=not progress
                ) as bar,
            ):
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        if total > start and part.stat().st_size < total:
            raise ConnectionError(f"{part.stat().st_size} of {total} bytes arrived")
    except urllib.error.HTTPError as error:
        # The part is the whole file already.
        if error.code == 416:
            return
        raise RunError(_failed(url, f"HTTP status {error.code}", part)) from error
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        raise RunError(_failed(url, str(error), part)) from error


def _unpack(archive: Path, target: Path) -> None:
    """Check the archive whole, then let its pictures appear at `target` at once."""
    with tempfile.TemporaryDirectory(prefix=".cue-conflict-", dir=target.parent) as temporary:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise RunError(f"what arrived is no whole archive ({error}); try again") from error
        found = next((path for path in [Path(temporary), *Path(temporary).rglob("*")] if _holds_categories(path)), None)
        if found is None:
            raise RunError(
                "what arrived does not hold the 16 category folders; the archive at this address has changed"
            )
        _check(found, RunError, "what arrived is not the set of 1280 pictures; the archive at this address has changed")
        (found / "LICENCE.txt").write_text(LICENCE + "\n", encoding="utf-8")
        if found == Path(temporary):
            inner = Path(temporary) / ".all"
            inner.mkdir()
            for path in list(found.iterdir()):
                if path != inner:
                    shutil.move(path, inner / path.name)
            found = inner
        os.replace(found, target)


def _holds_categories(path: Path) -> bool:
    return path.is_dir() and all((path / name).is_dir() for name in categories())


def _check(folder: Path, error: type[Exception], message: str) -> None:
    try:
        stimuli = find_stimuli(folder)
    except UsageError as problem:
        raise error(f"{message} ({problem})") from problem
    counts = Counter(one.shape for one in stimuli)
    if len(stimuli) != N_IMAGES or set(counts.values()) != {N_IMAGES // len(categories())}:
        raise error(f"{message} ({len(stimuli)} pictures in {len(counts)} categories)")


def _failed(url: str, reason: str, part: Path) -> str:
    return (
        f"cannot fetch {url}: {reason}. Try again (a transfer goes on where it stopped, at {part}), or get "
        "stimuli/style-transfer-preprocessed-512 of github.com/rgeirhos/texture-vs-shape by hand"
    )
