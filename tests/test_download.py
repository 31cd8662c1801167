"""Downloads of files whose size or digest is not known beforehand; tests/data/test_fetch.py has the pinned ones."""

import errno
import hashlib
from pathlib import Path

import numpy as np
import pytest
from server import digest

from jaxcnn import download as module
from jaxcnn.download import Remote, download
from jaxcnn.errors import InputError

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "weights" / "net.bin"


def names(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir()) if target.parent.exists() else []


def test_the_first_download_records_the_digest_as_sha256sum_does(server, target):
    seen = []
    assert download(Remote(server.url), target, progress=lambda *args: seen.append(args)) == target
    assert target.read_bytes() == CONTENT
    assert target.with_name("net.bin.sha256").read_text() == f"{digest(CONTENT)}  net.bin\n"
    assert names(target) == ["net.bin", "net.bin.sha256"]
    assert seen[0] == ("net.bin", 0, len(CONTENT))
    assert seen[-1] == ("net.bin", len(CONTENT), len(CONTENT))
    download(Remote(server.url), target)
    assert len(server.requests) == 1


def test_a_pinned_file_leaves_no_record(server, target):
    download(Remote(server.url, sha256=digest(CONTENT)), target)
    assert names(target) == ["net.bin"]


def test_a_file_that_changed_on_the_server_is_refused_with_both_digests(server, target):
    download(Remote(server.url), target)
    target.unlink()
    server.content = OTHER
    with pytest.raises(InputError, match=rf"{digest(OTHER)}, expected .*{digest(CONTENT)}.*delete .*net.bin.sha256"):
        download(Remote(server.url), target)
    assert names(target) == ["net.bin.sha256"]
    server.content = CONTENT
    assert download(Remote(server.url), target).read_bytes() == CONTENT


def test_a_file_that_changed_on_the_disk_is_refused_and_left_alone(server, target):
    download(Remote(server.url), target)
    target.write_bytes(OTHER)
    with pytest.raises(InputError, match=rf"{digest(OTHER)}, expected .*{digest(CONTENT)}: move it away"):
        download(Remote(server.url), target)
    assert target.read_bytes() == OTHER
    assert len(server.requests) == 1


def test_a_file_put_there_by_the_user_is_recorded(server, target):
    target.parent.mkdir()
    target.write_bytes(OTHER)
    download(Remote(server.url), target)
    assert target.with_name("net.bin.sha256").read_text().startswith(digest(OTHER))
    assert server.requests == []


@pytest.mark.parametrize("record", [b"", b"no digest\n", b"\xff" * 64, digest(CONTENT)[:63].encode()])
def test_a_damaged_record_is_refused(server, target, record):
    target.parent.mkdir()
    target.with_name("net.bin.sha256").write_bytes(record)
    with pytest.raises(InputError, match=r"net\.bin\.sha256 .*expected a SHA-256 digest: delete it"):
        download(Remote(server.url), target)
    assert server.requests == []


def test_an_md5_is_checked_and_the_sha256_recorded(server, target):
    with pytest.raises(InputError, match=r"MD5 .*expected 0123"):
        download(Remote(server.url, md5="0123"), target)
    assert names(target) == []
    md5 = hashlib.md5(CONTENT).hexdigest()
    download(Remote(server.url, md5=md5), target)
    assert target.with_name("net.bin.sha256").read_text().startswith(digest(CONTENT))


@pytest.mark.parametrize("pin", [{}, {"sha256": digest(CONTENT)}, {"size": len(CONTENT)}])
@pytest.mark.parametrize("stall", [False, True])
def test_a_download_that_breaks_off_or_stalls_goes_on_at_the_next_call(server, target, monkeypatch, pin, stall):
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.3)
    server.cut, server.stall = 100_000, stall
    with pytest.raises(InputError, match=("timed out" if stall else "broke off after 100000") + ".*run the same"):
        download(Remote(server.url, **pin), target)
    assert target.with_name("net.bin.partial").read_bytes() == CONTENT[:100_000]
    server.cut, server.stall = None, False
    assert download(Remote(server.url, **pin), target).read_bytes() == CONTENT
    assert server.requests[1]["range"] == "bytes=100000-"
    assert [name for name in names(target) if "partial" in name] == []


@pytest.mark.parametrize(("ranges", "etag"), [(True, True), ("lax", True), (True, False), (False, True)])
def test_two_versions_of_an_unknown_file_are_never_joined(server, target, ranges, etag):
    server.cut, server.ranges, server.etag = 100_000, ranges, etag
    with pytest.raises(InputError, match="broke off"):
        download(Remote(server.url), target)
    server.cut, server.content = None, OTHER
    assert download(Remote(server.url), target).read_bytes() == OTHER


@pytest.mark.parametrize("etag", ['W/"weak"', '"a\r\nX-Injected: 1"', "", "\xff"])
def test_only_a_strong_etag_is_sent_back(server, target, etag):
    target.parent.mkdir()
    target.with_name("net.bin.partial").write_bytes(OTHER[:1000])
    target.with_name("net.bin.partial.etag").write_bytes(etag.encode("latin-1"))
    assert download(Remote(server.url), target).read_bytes() == CONTENT
    assert not {"range", "if-range"} & set(server.requests[0])


def test_a_partial_file_that_is_complete_already_starts_over(server, target):
    target.parent.mkdir()
    target.with_name("net.bin.partial").write_bytes(CONTENT)
    assert download(Remote(server.url, sha256=digest(CONTENT)), target).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_redirect_is_followed_with_its_range(server, target):
    moved = server.url.replace("file.bin", "moved")
    server.moved["/moved"] = server.url
    server.cut = 100_000
    with pytest.raises(InputError, match="broke off"):
        download(Remote(moved), target)
    server.cut = None
    assert download(Remote(moved), target).read_bytes() == CONTENT
    assert server.requests[-1]["range"] == "bytes=100000-"


def test_a_server_that_promises_more_than_it_sends_leaves_no_file(server, target):
    server.length = "1000000"
    with pytest.raises(InputError, match="broke off after 300000 of 1000000 bytes"):
        download(Remote(server.url), target)
    assert not target.exists()


def test_no_more_is_taken_than_was_promised(server, target):
    server.length = "1000"
    assert download(Remote(server.url), target).read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("length", ["200001", "9" * 18])
def test_more_than_the_maximum_is_refused_before_a_byte_is_written(server, target, monkeypatch, length):
    monkeypatch.setattr(module, "MAX_BYTES", 200_000)
    server.length = length
    with pytest.raises(InputError, match=rf"{length} bytes, expected at most 200000"):
        download(Remote(server.url), target)
    assert names(target) == []


@pytest.mark.parametrize("length", [None, "many", "-1", "9" * 5000])
def test_an_unknown_length_is_refused_where_none_is_pinned(server, target, length):
    server.length = length
    with pytest.raises(InputError, match="does not say how long"):
        download(Remote(server.url), target)
    assert names(target) == []
    pinned = Remote(server.url, len(CONTENT), digest(CONTENT))
    assert download(pinned, target).read_bytes() == CONTENT


def test_progress_is_told_once_a_chunk(server, target, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 50_000)
    seen = []
    download(Remote(server.url), target, progress=lambda name, held, expected: seen.append(held))
    assert seen[0] == 0
    assert seen[-1] == len(CONTENT)
    assert len(seen) == 7


def test_a_full_disk_is_named(server, target, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*net\.bin: No space left on device"):
        download(Remote(server.url), target)
    assert not target.exists()
