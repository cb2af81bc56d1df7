"""Downloads against a server on this machine that misbehaves in every way met in the wild."""

import hashlib
import io
import multiprocessing
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import timm
import torch

from replknet._errors import RunError, UsageError
from replknet.models import create_model, download
from replknet.models.download import cache_folder, fetch_weights, local_pretrained_cfg
from replknet.models.weights import WEIGHTS, Source
from replknet.tasks.opened_model import open_model


def checkpoint(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.randn(200_000, generator=torch.Generator().manual_seed(seed))}, buffer)
    return buffer.getvalue()


FILE = checkpoint()
SHA = hashlib.sha256(FILE).hexdigest()[:8]
FORM = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="{action}" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="abc"><input type="hidden" name="confirm" value="t"></form></body></html>"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        name = urlsplit(self.path).path.strip("/").replace("-", "_")
        self.server.requests.append((name, self.headers.get("Range")))
        self.server.counts[name] = self.server.counts.get(name, 0) + 1
        getattr(self, name)(self.server.counts[name])

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def send_file(self, *, ranges: bool = True, stop: int | None = None, etag: str | None = '"v1"', body=FILE) -> None:
        wanted = self.headers.get("Range") if ranges else None
        if wanted and self.headers.get("If-Range", etag) != etag:
            wanted = None
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        tag = {"ETag": etag} if etag else {}
        if wanted:
            span = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            self.head(206, Content_Length=len(body) - start, **span, **tag)
        else:
            self.head(200, Content_Length=len(body), **tag)
        self.wfile.write(body[start:stop])

    def page(self, text: str) -> None:
        self.head(200, Content_Type="text/html; charset=utf-8", Content_Length=len(text.encode()))
        self.wfile.write(text.encode())

    def good(self, count: int) -> None:
        self.send_file()

    def breaks_off_once(self, count: int) -> None:
        self.send_file(stop=300_000 if count == 1 else None)

    def breaks_off_always(self, count: int) -> None:
        self.send_file(stop=300_000, ranges=False)

    def breaks_off_anonymously(self, count: int) -> None:
        self.send_file(stop=300_000, ranges=False, etag=None)

    def breaks_off_without_ranges(self, count: int) -> None:
        self.send_file(stop=300_000 if count == 1 else None, ranges=False)

    def breaks_off_and_changes(self, count: int) -> None:
        if count == 1:
            self.send_file(stop=300_000, etag='"old"', body=checkpoint(1))
        else:
            self.send_file()

    def breaks_off_and_ignores_if_range(self, count: int) -> None:
        if count == 1:
            self.send_file(stop=300_000, etag=None, body=checkpoint(1))
        else:
            self.send_file(etag=None)

    def closes_early_without_length(self, count: int) -> None:
        self.head(200)
        self.wfile.write(FILE[:300_000])

    def slow(self, count: int) -> None:
        self.head(200, Content_Length=len(FILE))
        for start in range(0, len(FILE), 100_000):
            self.wfile.write(FILE[start : start + 100_000])
            time.sleep(0.02)

    def stalls_once(self, count: int) -> None:
        if count > 1:
            return self.send_file()
        self.head(200, Content_Length=len(FILE), ETag='"v1"')
        self.wfile.write(FILE[:300_000])
        self.wfile.flush()
        self.server.stop.wait(5)

    def too_long(self, count: int) -> None:
        self.head(200, Content_Length=len(FILE))
        self.wfile.write(FILE + b"more")

    def wrong_size(self, count: int) -> None:
        self.head(200, Content_Length=len(FILE) - 7)
        self.wfile.write(FILE[:-7])

    def wrong_range(self, count: int) -> None:
        if count == 1:
            self.send_file(stop=300_000)
        elif self.headers.get("Range"):
            self.head(206, Content_Range=f"bytes 5-{len(FILE) - 1}/{len(FILE)}", Content_Length=len(FILE) - 5)
            self.wfile.write(FILE[5:])
        else:
            self.send_file()

    def range_not_satisfiable(self, count: int) -> None:
        if count == 1:
            self.send_file(stop=300_000)
        elif self.headers.get("Range"):
            self.head(416, Content_Length=0)
        else:
            self.send_file()

    def other_file(self, count: int) -> None:
        self.send_file(body=checkpoint(1))

    def html_page(self, count: int) -> None:
        self.page("<!DOCTYPE html><title>Google Drive - Quota\n exceeded</title>")

    def html_page_as_binary(self, count: int) -> None:
        self.send_file(body=b"  <!DOCTYPE html><title>Sign in</title>")

    def text_as_binary(self, count: int) -> None:
        self.send_file(body=b'{"error": "not today"}')

    def drive(self, count: int) -> None:
        self.page(FORM.format(action="/drive_file"))

    def drive_breaks_off(self, count: int) -> None:
        self.page(FORM.format(action="/drive_file_breaks_off"))

    def drive_elsewhere(self, count: int) -> None:
        self.page(FORM.format(action="http://example.invalid/file"))

    def drive_again(self, count: int) -> None:
        self.page(FORM.format(action="/drive_again"))

    def drive_file(self, count: int) -> None:
        query = parse_qs(urlsplit(self.path).query)
        assert query == {"id": ["abc"], "confirm": ["t"]}
        self.send_file()

    def drive_file_breaks_off(self, count: int) -> None:
        self.send_file(stop=300_000 if count == 1 else None)

    def missing(self, count: int) -> None:
        self.head(404, Content_Length=0)

    def down(self, count: int) -> None:
        self.head(500, Content_Length=0)

    def down_once(self, count: int) -> None:
        self.head(503, Content_Length=0) if count == 1 else self.send_file()

    def loop(self, count: int) -> None:
        self.head(302, Location="/loop", Content_Length=0)

    def moved(self, count: int) -> None:
        self.head(302, Location="/good", Content_Length=0)

    def gzip(self, count: int) -> None:
        self.head(200, Content_Encoding="gzip", Content_Length=3)
        self.wfile.write(b"abc")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []
        self.counts: dict[str, int] = {}
        self.stop = threading.Event()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is part of the plan


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "BACKOFF", 0.0)
    monkeypatch.setattr(download, "TIMEOUT", 2.0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("REPLKNET_WEIGHTS", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def entry_at(server: Server, *paths: str, sha: str | None = SHA, size: int | None = None):
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    sources = tuple(Source(base + path, f"{path}.pth", sha, size) for path in paths)
    return replace(WEIGHTS["replknet_31b.in1k_224"], sources=sources)


def leftovers() -> list[str]:
    return sorted(path.name for path in cache_folder().iterdir() if path.suffix != ".lock")


GOOD = [
    "good",
    "moved",
    "slow",
    "stalls_once",
    "breaks_off_once",
    "breaks_off_without_ranges",
    "breaks_off_and_changes",
    "breaks_off_and_ignores_if_range",
    "wrong_range",
    "range_not_satisfiable",
    "down_once",
    "drive",
    "drive_breaks_off",
]


@pytest.mark.parametrize("path", GOOD)
def test_arrives_whole(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    entry = entry_at(server, path)
    got = fetch_weights(entry)
    assert got == cache_folder() / f"{path}.pth"
    assert got.read_bytes() == FILE
    assert leftovers() == [got.name]
    asked = len(server.requests)
    assert fetch_weights(entry) == got
    assert len(server.requests) == asked, "a cached file is not asked for again"


@pytest.mark.parametrize("path", ["breaks_off_once", "stalls_once", "drive_breaks_off"])
def test_goes_on_where_it_stopped(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    fetch_weights(entry_at(server, path, sha=None))
    assert server.requests[-1][1] == "bytes=300000-"


def test_another_process_goes_on_with_what_one_left(server):
    entry = entry_at(server, "breaks_off_always", sha=None)
    with pytest.raises(RunError):
        fetch_weights(entry)
    part = cache_folder() / "good.pth.part"
    (cache_folder() / "breaks_off_always.pth.part").rename(part)
    state = (cache_folder() / "breaks_off_always.pth.part.json").read_text()
    part.with_name(part.name + ".json").write_text(state.replace("breaks_off_always", "good"))
    assert fetch_weights(entry_at(server, "good", sha=None)).read_bytes() == FILE
    assert server.requests[-1] == ("good", "bytes=300000-")


@pytest.mark.parametrize("state", [None, "", "{}", '{"url": 1}', "[1]"])
def test_a_part_of_unknown_origin_is_not_continued(server, state):
    cache_folder().mkdir(parents=True)
    part = cache_folder() / "good.pth.part"
    part.write_bytes(b"x" * 1000)
    if state is not None:
        part.with_name(part.name + ".json").write_text(state)
    assert fetch_weights(entry_at(server, "good", sha=None)).read_bytes() == FILE
    assert server.requests == [("good", None)]


BAD = {
    "missing": r"HTTP status 404",
    "down": r"HTTP status 500",
    "loop": r"redirect",
    "html_page": r"web page, 'Google Drive - Quota exceeded'",
    "html_page_as_binary": r"it is a web page",
    "text_as_binary": r"not a PyTorch checkpoint",
    "drive_again": r"web page, 'Google Drive - Virus scan warning'",
    "drive_elsewhere": r"web page, 'Google Drive - Virus scan warning'",
    "breaks_off_always": r"broke off after 300000 of \d+ bytes",
    "closes_early_without_length": r"its end is missing",
    "wrong_size": r"its end is missing|SHA-256",
    "other_file": r"SHA-256",
    "gzip": r"encodes the file as gzip",
}


@pytest.mark.parametrize("path", BAD)
def test_refuses_and_says_what_to_do(server, path):
    entry = entry_at(server, path)
    with pytest.raises(RunError, match=BAD[path]) as failure:
        fetch_weights(entry)
    message = str(failure.value)
    assert entry.sources[0].url in message
    assert f"{path}.pth" in message
    assert str(cache_folder()) in message
    assert "REPLKNET_WEIGHTS" in message
    assert not (cache_folder() / f"{path}.pth").exists()


def test_bytes_beyond_the_announced_length_are_not_read(server):
    assert fetch_weights(entry_at(server, "too_long")).read_bytes() == FILE


def test_a_known_size_is_held_against_the_announced_one(server):
    with pytest.raises(RunError, match=f"offers {len(FILE)} bytes, the file has {len(FILE) + 1}"):
        fetch_weights(entry_at(server, "good", size=len(FILE) + 1))
    assert leftovers() == []


@pytest.mark.parametrize("first", ["missing", "down", "html_page", "other_file", "loop"])
def test_the_next_source_is_tried(server, first):
    assert fetch_weights(entry_at(server, first, "good")).name == "good.pth"


def test_a_part_that_no_run_can_continue_is_removed(server):
    """No hash, no ETag, no date: nothing would tell whether the rest belongs to it."""
    with pytest.raises(RunError, match="broke off after 300000"):
        fetch_weights(entry_at(server, "breaks_off_anonymously", sha=None))
    assert leftovers() == []


def test_nothing_is_left_of_a_source_that_was_given_up(server):
    assert fetch_weights(entry_at(server, "breaks_off_always", "good")).name == "good.pth"
    assert leftovers() == ["good.pth"]


def test_every_new_try_is_announced(server, caplog):
    fetch_weights(entry_at(server, "down_once"))
    assert [(r.levelname, "HTTP status 503; trying again" in r.message) for r in caplog.records] == [("WARNING", True)]


def test_an_unreachable_server_is_named(server):
    entry = entry_at(server, "good")
    closed = replace(entry, sources=(Source("http://127.0.0.1:9/weights.pth", "weights.pth"),))
    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9/weights\.pth \(.*refused"):
        fetch_weights(closed)


def test_a_folder_of_files_put_there_by_hand_needs_no_network(tmp_path, monkeypatch, server):
    entry = entry_at(server, "missing", "also_missing")
    monkeypatch.setenv("REPLKNET_WEIGHTS", str(tmp_path))
    (tmp_path / "also_missing.pth").write_bytes(FILE)
    assert fetch_weights(entry) == tmp_path / "also_missing.pth"
    assert server.requests == []


def test_a_folder_given_as_weights_holds_the_official_file(tmp_path):
    files = {"replknet_31b": "RepLKNet-31B_ImageNet-1K_384.pth", "replknet_13": "RepLKNet-13_ImageNet-1K_120e.pth"}
    for outputs, (name, file) in zip((11, 7), files.items(), strict=True):
        torch.save(timm.create_model(name, num_classes=outputs).state_dict(), tmp_path / file)
    opened = open_model("replknet_31b.in1k_384", weights=tmp_path)
    assert (opened.outputs, opened.image.size) == (11, 384)
    assert create_model("replknet_13", weights=str(tmp_path)).num_classes == 7
    with pytest.raises(UsageError, match=r"does not hold the weights replknet_31b\.in1k_224.*31B_ImageNet-1K_224\.pth"):
        create_model("replknet_31b", weights=tmp_path)
    with pytest.raises(UsageError, match="is a folder; give a checkpoint file inside it"):
        create_model("resnet18", weights=tmp_path)
    (tmp_path / "RepLKNet-31B_ImageNet-22K.pth").write_bytes(b"<html>")
    with pytest.raises(RunError, match=r"22K\.pth is not the file of the official release"):
        create_model("replknet_31b.in22k", weights=tmp_path)


@pytest.mark.parametrize("content", [FILE[:-100], b"", b"<html>", b"hello", checkpoint(1)], ids=range(5))
def test_a_damaged_file_put_there_by_hand_is_named(tmp_path, monkeypatch, server, content):
    monkeypatch.setenv("REPLKNET_WEIGHTS", str(tmp_path))
    (tmp_path / "good.pth").write_bytes(content)
    with pytest.raises(RunError, match=r"good\.pth is not the file of the official release"):
        fetch_weights(entry_at(server, "good"))


def test_a_weights_folder_that_is_none_is_a_usage_error(tmp_path, monkeypatch, server):
    monkeypatch.setenv("REPLKNET_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"REPLKNET_WEIGHTS names .*nowhere"):
        fetch_weights(entry_at(server, "good"))


def test_a_cache_that_takes_no_file_is_named(server, tmp_path):
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(RunError, match=r"cannot be saved as .*good\.pth: .*TORCH_HOME.*REPLKNET_WEIGHTS"):
        fetch_weights(entry_at(server, "good"))
    assert server.requests == []


def test_a_full_disk_is_said_and_the_rest_comes_later(server):
    resource = pytest.importorskip("resource", reason="file size limits exist on Unix only")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot be saved as .*good\.pth: .*Make room"):
            fetch_weights(entry_at(server, "good"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "good.pth" not in leftovers()
    assert fetch_weights(entry_at(server, "good")).read_bytes() == FILE
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-"]


def test_processes_share_one_download(server):
    entry = entry_at(server, "slow")
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        paths = pool.map(fetch_weights, [entry] * 2)
    assert {path.read_bytes() == FILE for path in paths} == {True}
    assert server.counts == {"slow": 1}


def test_a_killed_download_is_continued_by_the_next_process(server):
    entry = entry_at(server, "stalls_once", sha=None)
    process = multiprocessing.get_context("spawn").Process(target=fetch_weights, args=(entry,), daemon=True)
    process.start()
    part = cache_folder() / "stalls_once.pth.part"
    while not (part.is_file() and part.stat().st_size > 0):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    held = part.stat().st_size
    assert not part.with_name("stalls_once.pth").exists()
    assert fetch_weights(entry).read_bytes() == FILE
    assert server.requests[-1] == ("stalls_once", f"bytes={held}-")


def test_progress_is_shown_on_request(server, capfd):
    fetch_weights(entry_at(server, "good"), progress=True)
    assert "good.pth" in capfd.readouterr().err


def test_progress_is_silent_without_a_terminal(server, capfd):
    fetch_weights(entry_at(server, "good"))
    assert capfd.readouterr() == ("", "")


def test_configurations_with_their_own_weights_stay_as_they_are(server, monkeypatch):
    entry = entry_at(server, "good")
    monkeypatch.setitem(WEIGHTS, entry.name, entry)
    cfg = timm.models.PretrainedCfg(url=entry.sources[0].url, tag=entry.tag, architecture=entry.model)
    assert local_pretrained_cfg("replknet_31b", cfg) == {"file": str(cache_folder() / "good.pth")}
    for own in ({"file": "x.pth"}, {"source": "hf-hub"}, {"source": "local-dir"}, {"url": "http://elsewhere/x.pth"}):
        assert local_pretrained_cfg("replknet_31b", replace(cfg, **own)) == {}


def mmpretrain_layout(state: dict) -> dict:
    names = {}
    for name in state:
        if name.startswith("head."):
            names[name] = name.replace("head.", "head.fc.")
        elif name.startswith("norm."):
            names[name] = f"backbone.stages.3.{name}"
        else:
            names[name] = f"backbone.{name}"
    return {"meta": {}, "state_dict": {names[name]: value for name, value in state.items()}}


def a_network(name: str = "replknet_nano") -> Any:
    torch.manual_seed(5)
    model: Any = timm.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var = torch.empty_like(module.weight).uniform_(0.5, 2.0)
    return model


@pytest.fixture
def serve_weights(server, monkeypatch):
    """Make the local server the place of the weights of `model.tag`."""

    def serve(contents: dict, model: str = "replknet_nano", tag: str = "untrained") -> dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(contents, buffer)
        monkeypatch.setattr(Handler, "good", lambda self, count: self.send_file(body=buffer.getvalue()))
        entry = replace(entry_at(server, "good", sha=None), model=model, tag=tag)
        monkeypatch.setitem(WEIGHTS, entry.name, entry)
        return {"pretrained": True, "pretrained_cfg_overlay": {"url": entry.sources[0].url}}

    return serve


def images(size: int = 32) -> torch.Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


LAYOUTS = {"mmpretrain": mmpretrain_layout, "raw": dict, "wrapped": lambda state: {"model": state}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("create", [timm.create_model, create_model], ids=["timm", "replknet"])
@torch.no_grad()
def test_pretrained_models_come_through_the_download(serve_weights, server, layout, create):
    original = a_network()
    arguments = serve_weights(LAYOUTS[layout](original.state_dict()))
    model = create("replknet_nano", **arguments).eval()
    assert server.counts == {"good": 1}
    assert torch.equal(model(images()), original(images()))
    create("replknet_nano.untrained", **arguments)
    assert server.counts == {"good": 1}, "the second model comes from the cache"


@torch.no_grad()
def test_pretrained_features_and_another_head_come_through_the_download(serve_weights):
    original = a_network()
    arguments = serve_weights(mmpretrain_layout(original.state_dict()))
    other: Any = timm.create_model("replknet_nano", num_classes=7, in_chans=1, **arguments)
    assert torch.equal(other.norm.running_var, original.norm.running_var)
    features: Any = timm.create_model("replknet_nano", features_only=True, **arguments).eval()
    assert torch.equal(features(images())[-1], original.forward_features(images()))


@pytest.mark.parametrize("contents", [{"weight": torch.zeros(3)}, {}, {"state_dict": {"stem.0.conv.weight": None}}])
def test_weights_of_another_network_are_refused(serve_weights, contents):
    with pytest.raises((RunError, RuntimeError), match=r"stem|Missing|holds no weights"):
        timm.create_model("replknet_nano", **serve_weights(contents))


def test_a_model_without_official_weights_says_so():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for replknet_nano"):
        timm.create_model("replknet_nano", pretrained=True)


@pytest.mark.slow
@torch.no_grad()
def test_31b_by_its_tag_through_the_download(serve_weights, server):
    original = a_network("replknet_31b")
    serve_weights(mmpretrain_layout(original.state_dict()), "replknet_31b", "in1k_224")
    model = timm.create_model("replknet_31b.in1k_224", pretrained=True).eval()
    assert server.counts == {"good": 1}
    assert torch.equal(model(images(64)), original(images(64)))
