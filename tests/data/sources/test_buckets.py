"""Pairs are read from buckets, and a bucket that does not answer is a one-line error within the time limit."""

import contextlib
import gzip
import pickle
import random
import socket
import threading
import time

import pytest
from shards import image_bytes, pair_members, write_shards, write_tar

from clip_jax.data.pipeline import LoadPair
from clip_jax.data.sources import Mixture, PairError, ShardError, buckets, open_source, webdataset


def pairs(source) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(source[index].image, tuple(source[index].captions)) for index in range(len(source))]


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on localhost with one bucket, for which fsspec is configured."""
    moto_server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    import os

    import fsspec

    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("bucket")
    yield filesystem
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    with contextlib.suppress(Exception):
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_in_a_bucket_are_read_by_ranges(tmp_path, bucket):
    local = open_source(write_shards(tmp_path, shards=2, pairs=5))
    for shard in range(2):
        bucket.put(f"{tmp_path}/0000{shard}.tar", f"bucket/shards/0000{shard}.tar")
    for name in ("{00000..00001}", "*"):
        source = open_source(f"wds:s3://bucket/shards/{name}.tar")
        assert pairs(source) == pairs(local)
        assert source.fingerprint() == local.fingerprint()
    bucket.rm("bucket/shards/00001.tar")
    with pytest.raises(ShardError, match=r"s3://bucket/shards/00001\.tar has been deleted or rewritten"):
        source[7]
    with pytest.raises(FileNotFoundError):
        open_source("wds:s3://bucket/shards/{00000..00001}.tar")


def test_a_changed_shard_in_a_bucket_is_indexed_again(tmp_path, bucket):
    for numbers in (range(3), range(5, 7)):
        write_tar(tmp_path / "a.tar", pair_members(numbers))
        bucket.put(f"{tmp_path}/a.tar", "bucket/a.tar")
        bucket.invalidate_cache()
        source = open_source("wds:s3://bucket/a.tar")
        assert pairs(source) == [(image_bytes(number), (f"number {number}",)) for number in numbers]


def test_a_shard_rewritten_at_the_same_size_is_an_error(tmp_path, bucket):
    write_tar(tmp_path / "a.tar", pair_members(range(3)))
    content = (tmp_path / "a.tar").read_bytes()
    bucket.pipe("bucket/same/a.tar", content)
    source = open_source("wds:s3://bucket/same/a.tar")
    assert source[1].captions == ["number 1"]
    bucket.pipe("bucket/same/a.tar", content.replace(b"number 1", b"number 7"))
    with pytest.raises(ShardError, match=r"^s3://bucket/same/a\.tar has been rewritten since it was opened$"):
        source[1]
    bucket.pipe("bucket/same/a.tar", content)  # the same content has the same tag
    assert source[1].captions == ["number 1"]


@pytest.mark.parametrize(
    ("path", "tag", "options"),
    [
        ("gs://bucket/a.tar", "1700000000000000", {"generation": "1700000000000000"}),
        ("gs://bucket/a.tar", "CJDQ=", {}),
        ("http://host/a.tar", '"abc"', {"headers": {"If-Match": '"abc"'}}),
        ("http://host/a.tar", 'W/"abc"', {}),
        ("http://host/a.tar", "", {}),
        ("memory://a.tar", "1", {}),
    ],
)
def test_other_protocols_demand_the_same_file_as_they_can(path, tag, options):
    assert buckets._demanding(path, tag) == ("cat_file", options)


def test_a_web_server_is_asked_for_the_same_file():
    requests = []

    def answer(connection: socket.socket) -> None:
        requests.append(connection.recv(10_000).decode())
        body = b"abcd" if 'if-match: "one"' in requests[-1].lower() else b""
        status = "206 Partial Content" if body else "412 Precondition Failed"
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + body)
        connection.close()

    pytest.importorskip("aiohttp")
    with server(answer) as address:
        assert buckets.read_remote(f"{address}/a.tar", 0, 4, '"one"') == b"abcd"
        with pytest.raises(ShardError, match="has been rewritten since it was opened"):
            buckets.read_remote(f"{address}/a.tar", 0, 4, '"two"')


def test_a_shard_that_is_added_is_indexed_alone(tmp_path, bucket, monkeypatch):
    indexed, index_file = [], webdataset._index_file

    def record(path: str, at_start):
        indexed.append(path)
        return index_file(path, at_start)

    monkeypatch.setattr(webdataset, "_index_file", record)
    for shard in range(3):
        write_tar(tmp_path / "a.tar", pair_members(range(shard, shard + 2)))
        bucket.put(f"{tmp_path}/a.tar", f"bucket/growing/0000{shard}.tar")
    assert len(open_source("wds:s3://bucket/growing/{00000..00001}.tar")) == 4
    assert len(indexed) == 2
    assert len(open_source("wds:s3://bucket/growing/*.tar")) == 6
    assert indexed[2:] == ["s3://bucket/growing/00002.tar"]
    assert len(open_source("wds:s3://bucket/growing/{00001..00002}.tar")) == 4
    assert len(indexed) == 3


def test_a_table_in_a_bucket_names_images_relative_to_it(bucket):
    bucket.pipe("bucket/table/pairs.csv", b"image,caption\nfolder/a.png,words\n")
    bucket.pipe("bucket/table/folder/a.png", image_bytes(3))
    assert pairs(open_source("csv:s3://bucket/table/pairs.csv")) == [(image_bytes(3), ("words",))]


@contextlib.contextmanager
def server(answer):
    """A server on localhost that calls ``answer`` for each connection. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connections = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connections.append(listening.accept()[0])
                    answer(connections[-1])

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


def deny(connection: socket.socket) -> None:
    """Answers as for a wrong key or a missing permission."""
    head_only = connection.recv(65_536).startswith(b"HEAD ")
    body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist</Message></Error>"
    headers = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection.sendall(headers if head_only else headers + body)
    connection.close()


def stall(connection: socket.socket) -> None:
    """Starts an answer and does not finish it."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nContent-Type: text/csv\r\n\r\nimage,")


@pytest.fixture
def impatient(monkeypatch):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    before = buckets.current_access()
    buckets.use_access(buckets.Access(timeout=0.3, retries=1))
    monkeypatch.setattr(buckets, "FIRST_PAUSE", 0.01)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    yield
    buckets.use_access(before)


@pytest.mark.parametrize(
    ("answer", "address", "expected"),
    [
        (deny, "s3://bucket/a", "access denied .*check the credentials and the bucket's permissions"),
        (lambda connection: None, "s3://bucket/a", r"no answer within 0\.3 s, 2 times; .*config\.data\.bucket_timeout"),
        (lambda connection: connection.close(), "s3://bucket/a", "s3://bucket/a: "),
        (stall, "{server}/a", r"no answer within 0\.3 s, 2 times"),
        (deny, "{server}/a", "access denied"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "wds"])
def test_an_unreadable_bucket_is_one_line_within_the_time_limit(
    impatient, monkeypatch, answer, address, expected, kind
):
    with server(answer) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        started = time.monotonic()
        with pytest.raises(OSError, match=expected) as caught:
            open_source(f"{kind}:{address.format(server=endpoint)}")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"AWS_ACCESS_KEY_ID": None}, "no credentials .*: set AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "none"}, "no credentials .*none"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Could not connect to the endpoint"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense"),
        ({}, "no file s3://nowhere/a; are bucket and path right"),
    ],
)
def test_a_mistake_about_a_bucket_is_one_line(bucket, impatient, monkeypatch, tmp_path, variables, expected):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=expected) as caught:
        open_source("csv:s3://nowhere/a")
    assert "\n" not in str(caught.value)


def test_five_requests_without_an_answer_end_the_run(bucket, impatient, monkeypatch):
    bucket.pipe("bucket/silent/pairs.csv", b"image,caption\n" + b"a.png,words\n" * 9)
    bucket.pipe("bucket/silent/a.png", image_bytes(3))
    source = open_source("csv:s3://bucket/silent/pairs.csv")
    assert source[0].image == image_bytes(3)
    with server(lambda connection: None) as endpoint:
        pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
        buckets.filesystem.cache_clear()
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for index in range(buckets.MAX_UNANSWERED - 1):
            with pytest.raises(PairError, match="no answer within") as caught:
                source[index]
            assert caught.value.reason == "unreadable_file"
        with pytest.raises(ShardError, match="the 4 requests before failed, too"):
            source[5]


def test_workers_read_buckets_as_the_training_process_does(impatient):
    packed = pickle.dumps(LoadPair(Mixture(["digits"], [["pair"]]), None))
    wanted = buckets.current_access()
    buckets.use_access(buckets.Access())
    pickle.loads(packed)
    assert buckets.current_access() == wanted


def test_a_large_object_is_read_in_pieces(bucket, monkeypatch):
    monkeypatch.setattr(buckets, "PIECE", 1_000)
    bucket.pipe("bucket/large/pairs.csv.gz", gzip.compress(random.Random(0).randbytes(3_000)))
    expected = bucket.cat("bucket/large/pairs.csv.gz")
    assert buckets.read_remote("s3://bucket/large/pairs.csv.gz", 0, len(expected)) == expected
    rows = b"image,caption\n" + b"".join(b"%d.png,%d\n" % (n, n) for n in range(900))
    bucket.pipe("bucket/large/pairs.csv", rows)
    assert len(open_source("csv:s3://bucket/large/pairs.csv")) == 900


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=r"nonsense:// cannot be read: .*"):
        open_source("wds:nonsense://bucket/a.tar")


def test_a_table_rewritten_in_a_bucket_is_an_error(bucket):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(numbers: range) -> None:
        with bucket.open("bucket/rows.parquet", "wb") as file:
            table = {"image": [image_bytes(number) for number in numbers], "caption": ["words"] * len(numbers)}
            parquet.write_table(pyarrow.table(table), file)

    write(range(3))
    source = open_source("parquet:s3://bucket/rows.parquet?image=image&caption=caption")
    write(range(3, 6))
    with pytest.raises(ShardError, match="has been rewritten since it was opened"):
        source[1]
