"""Fetching the cue-conflict pictures from a local server: resuming, checking, and what can go wrong on the way."""

import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from replknet._errors import RunError, UsageError
from replknet.analysis.cue_conflict import LICENCE, download_cue_conflict
from replknet.analysis.shape_bias import categories, find_stimuli


def archive(images_a_category=80, top="cue-conflict/", extra=()):
    buffer = io.BytesIO()
    names = list(categories())
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for shape in names:
            for index in range(images_a_category):
                data = f"picture {index}".encode()
                info = tarfile.TarInfo(f"{top}{shape}/{shape}{index}-{names[index % 16]}{index}.png")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        for name in extra:
            tar.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """Serves one file; `cut` breaks the next transfer off after so many bytes."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.status, self.ranges = b"", None, 200, []
        self.url = f"http://127.0.0.1:{self.server_port}/cue-conflict.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if server.status != 200 or (start and start >= len(server.content)):
            self.send_error(416 if start else server.status)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if server.cut is None else body[: server.cut])
        server.cut = None

    def log_message(self, *_args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("top", ["cue-conflict/", "", "a/b/"])
def test_pictures_and_licence_arrive_and_nothing_else_stays(server, tmp_path, top):
    server.content = archive(top=top)
    folder = download_cue_conflict(tmp_path / "data", url=server.url)
    assert folder == tmp_path / "data" / "cue-conflict"
    assert len(find_stimuli(folder)) == 1280
    assert (folder / "LICENCE.txt").read_text() == LICENCE + "\n"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cue-conflict"]


def test_a_second_call_fetches_nothing(server, tmp_path):
    server.content = archive()
    download_cue_conflict(tmp_path, url=server.url)
    assert download_cue_conflict(tmp_path, url=server.url) == tmp_path / "cue-conflict"
    assert server.ranges == [None]


def test_a_broken_transfer_goes_on(server, tmp_path):
    server.content, server.cut = archive(), 3000
    with pytest.raises(RunError, match="goes on where it stopped"):
        download_cue_conflict(tmp_path, url=server.url)
    assert not (tmp_path / "cue-conflict").exists()
    folder = download_cue_conflict(tmp_path, url=server.url)
    assert server.ranges == [None, "bytes=3000-"]
    assert len(find_stimuli(folder)) == 1280


def test_a_whole_part_is_used(server, tmp_path):
    server.content = archive()
    (tmp_path / "cue-conflict.tar.gz.part").write_bytes(server.content)
    assert len(find_stimuli(download_cue_conflict(tmp_path, url=server.url))) == 1280


def test_the_part_of_something_else_is_fetched_anew(server, tmp_path):
    server.content = archive()
    (tmp_path / "cue-conflict.tar.gz.part").write_bytes(b"something else altogether")
    assert len(find_stimuli(download_cue_conflict(tmp_path, url=server.url))) == 1280
    assert server.ranges == ["bytes=25-", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>sign in</html>", "no whole archive"),
        (archive(images_a_category=79), "not the set of 1280"),
        (archive(extra=["cue-conflict/zebra/zebra1-cat1.png"]), "not the set of 1280"),
        (archive(extra=["../../escaped.png"]), "no whole archive"),
    ],
    ids=["page", "few", "stranger", "escape"],
)
def test_what_is_not_the_set_leaves_nothing(server, tmp_path, content, message):
    server.content = content
    with pytest.raises(RunError, match=message):
        download_cue_conflict(tmp_path / "data", url=server.url)
    assert list((tmp_path / "data").iterdir()) == []


def test_no_server_and_no_file(server, tmp_path):
    server.status = 404
    with pytest.raises(RunError, match=r"HTTP status 404.*by hand"):
        download_cue_conflict(tmp_path, url=server.url)
    with pytest.raises(RunError, match="cannot fetch"):
        download_cue_conflict(tmp_path, url="http://127.0.0.1:9/none.tar.gz")


def test_something_in_the_way_is_kept(tmp_path):
    (tmp_path / "cue-conflict").mkdir()
    (tmp_path / "cue-conflict" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there and is not the set"):
        download_cue_conflict(tmp_path)
    assert (tmp_path / "cue-conflict" / "mine.txt").read_text() == "mine"
