"""Downloads against a server on this machine that can be made to misbehave."""

import gzip
import hashlib
import io
import os
import re
import urllib.request
from http.client import HTTPMessage
from pathlib import Path

import numpy as np
import pytest

from jaxcnn import download as download_module
from jaxcnn.data.fetch import FILES, Original, Remote, fetch
from jaxcnn.data.sources import SOURCES
from jaxcnn.errors import InputError

CONTENT = np.random.default_rng(0).bytes(300_000)
PIN = hashlib.sha256(CONTENT).hexdigest()
REAL = os.environ.get("JAXCNN_DATA")


@pytest.fixture
def server(server, monkeypatch):
    """Serves the data set "made" of one file."""
    url = server.url.replace("file.bin", "set.bin")
    made = Original((Remote(url, len(CONTENT), PIN),), licence="none", citation="none")
    monkeypatch.setitem(FILES, "made", made)
    return server


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_download_arrives_whole_and_is_not_repeated(server, tmp_path):
    seen = []
    paths = fetch("made", tmp_path, progress=lambda *args: seen.append(args))
    assert paths == [tmp_path / "made" / "set.bin"]
    assert paths[0].read_bytes() == CONTENT
    assert tree(tmp_path) == ["made/set.bin"]
    assert server.requests[0]["user-agent"].startswith("jaxcnn/")
    assert seen[0] == ("set.bin", 0, len(CONTENT))
    assert seen[-1] == ("set.bin", len(CONTENT), len(CONTENT))
    assert fetch("made", tmp_path) == paths
    assert len(server.requests) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_broke_off_goes_on(server, tmp_path, ranges):
    server.cut, server.ranges = 100_000, ranges
    with pytest.raises(InputError, match=r"broke off after 100000 of 300000 bytes.*run the same command again"):
        fetch("made", tmp_path)
    assert tree(tmp_path) == ["made/set.bin.partial"]
    server.cut = None
    (path,) = fetch("made", tmp_path)
    assert server.requests[1]["range"] == "bytes=100000-"
    assert path.read_bytes() == CONTENT
    assert tree(tmp_path) == ["made/set.bin"]


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (CONTENT[:-1] + b"\0", "300000"),  # corrupt
        (CONTENT[:1000], "1000"),  # another, shorter file
        (CONTENT + b"more", "300001"),  # a longer one, of which no more is taken than shows it
    ],
)
def test_a_wrong_file_is_named_by_both_digests_and_not_kept(server, tmp_path, content, size):
    server.content = content
    found = hashlib.sha256(content[: int(size)]).hexdigest()
    with pytest.raises(InputError, match=rf"{size} bytes with SHA-256 {found}, expected 300000 bytes with {PIN}"):
        fetch("made", tmp_path)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    "partial", [b"\0" * 1000, CONTENT, CONTENT + b"x"], ids=["another file", "complete", "too long"]
)
def test_whatever_partial_file_lies_there_nothing_wrong_is_kept(server, tmp_path, partial):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "set.bin.partial").write_bytes(partial)
    if partial[:1] == b"\0":
        with pytest.raises(InputError, match="nothing was kept"):
            fetch("made", tmp_path)
        assert tree(tmp_path) == []
    (path,) = fetch("made", tmp_path)
    assert path.read_bytes() == CONTENT
    assert tree(tmp_path) == ["made/set.bin"]


def test_a_file_of_another_digest_is_left_alone(server, tmp_path):
    (tmp_path / "made").mkdir()
    path = tmp_path / "made" / "set.bin"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"set.bin is not the pinned original: 4 bytes.*{PIN}: move it away"):
        fetch("made", tmp_path)
    assert path.read_bytes() == b"mine"
    assert server.requests == []


def test_a_page_that_is_not_there_leaves_nothing(server, tmp_path):
    server.status = 404
    with pytest.raises(InputError, match=r"set\.bin: HTTP 404"):
        fetch("made", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_an_input_error(server, tmp_path, monkeypatch):
    nowhere = Remote("http://127.0.0.1:9/set.bin", 1, PIN)
    monkeypatch.setitem(FILES, "made", Original((nowhere,), "none", "none"))
    with pytest.raises(InputError, match=r"cannot download http://127\.0\.0\.1:9/set\.bin: .*refused"):
        fetch("made", tmp_path)


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "made").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*made/set\.bin"):
        fetch("made", tmp_path)


def test_a_redirect_to_another_scheme_is_refused(server, tmp_path, monkeypatch):
    elsewhere = server.moved["/set.bin"] = "ftp://127.0.0.1/set.bin"
    with pytest.raises(InputError, match=f"will not download from {elsewhere}: expected http"):
        fetch("made", tmp_path)
    assert tree(tmp_path) == []


def test_a_redirect_from_https_to_http_is_refused():
    request = urllib.request.Request("https://example.org/set.bin")
    target = "http://example.org/set.bin"
    with pytest.raises(InputError, match="will not download from http:"):
        download_module._Redirects().redirect_request(request, io.BytesIO(), 302, "", HTTPMessage(), target)


def test_only_https_is_spoken(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "SCHEMES", ("https",))
    with pytest.raises(InputError, match=r"will not download from http:.*expected https"):
        fetch("made", tmp_path)
    assert server.requests == []


def test_the_table_is_complete_and_names_files_the_sources_read():
    assert set(FILES) == set(SOURCES) - {"digits"}
    for original in FILES.values():
        assert original.licence
        assert original.citation
        for remote in original.files:
            assert remote.url.startswith("https://")
            assert remote.size
            assert re.fullmatch("[0-9a-f]{64}", remote.sha256 or "")
    with pytest.raises(InputError, match="did you mean 'cifar100'"):
        fetch("cifar1000", "anywhere")


def test_the_pins_are_those_of_tensorflow_datasets():
    tfds = pytest.importorskip("tensorflow_datasets")
    for name, original in FILES.items():
        lines = (Path(tfds.__file__).parent / "url_checksums" / f"{name}.txt").read_text().splitlines()
        theirs = {tuple(line.split("\t")[1:]) for line in lines}
        assert {(str(f.size), f.sha256, f.name) for f in original.files} <= theirs


@pytest.mark.skipif(not REAL, reason="JAXCNN_DATA does not point at the original files")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_pins_are_those_of_the_original_files(name):
    assert REAL is not None
    for remote in FILES[name].files:
        content = (Path(REAL) / name / remote.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (remote.size, remote.sha256)
        gzip.decompress(content)
