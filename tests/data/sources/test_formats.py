"""JSON lines, Parquet, TensorFlow Datasets and buckets give the pairs that were put into them."""

import contextlib
import json
import pickle

import pytest
from shards import pair_members, picture, write_shards, write_tar

from clip_jax.data.sources import PairError, ShardError, open_source


def pairs(source) -> list[tuple[bytes, tuple[str, ...]]]:
    copy = pickle.loads(pickle.dumps(source))  # as a worker gets it
    return [(copy[index].image, tuple(copy[index].captions)) for index in range(len(copy))]


def test_json_lines_name_pictures_relative_to_their_file(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [{"image": f"{number}.png", "texts": [f"number {number}", "x"], "label": number} for number in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(f"jsonl:{tmp_path}/pairs.jsonl?caption=texts&label=label")
    assert pairs(source) == [(picture(number), (f"number {number}", "x")) for number in range(3)]
    assert source[2].label == "2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1: no JSON: Expecting"),
        ("[1]", "line 1: no object"),
        ("[" * 100_000, "line 1: no JSON"),
        ('{"image": "a.png", "caption": "\\ud800"}', "half a character"),
        ('{"image": "a.png", "caption": {"x": 1}}', "caption is dict, not text"),
        ('{"image": "a\\u0000.png", "caption": "x"}', "null byte"),
        ('{"image": "nonsense://a.png", "caption": "x"}', "nonsense"),
    ],
)
def test_a_line_that_is_no_pair_is_a_bad_sample_and_the_next_one_a_good_one(tmp_path, text, expected):
    (tmp_path / "b.png").write_bytes(picture(1))
    (tmp_path / "pairs.jsonl").write_text(f'{text}\n{{"image": "b.png", "caption": "x"}}\n')
    source = open_source(f"jsonl:{tmp_path}/pairs.jsonl")
    with pytest.raises(PairError, match=expected):
        source[0]
    assert source[1].captions == ["x"]


def test_one_table_with_other_options_is_another_source_also_in_a_worker(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "pairs.csv").write_text("image,short,long\na.png,s,l\n")
    both = open_source(f"csv:{tmp_path}/pairs.csv?caption=short + csv:{tmp_path}/pairs.csv?caption=long")
    assert pairs(both) == [(picture(1), ("s",)), (picture(1), ("l",))]


def test_a_field_longer_than_pythons_csv_reader_takes_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "pairs.csv").write_text(f"image,caption\na.png,{'word ' * 40_000}\n")
    assert open_source(f"csv:{tmp_path}/pairs.csv")[0].captions[0].startswith("word word")


def test_a_folders_fingerprint_knows_the_pictures_sizes(tmp_path):
    prints = set()
    for size in (8, 64):
        (tmp_path / "a.png").write_bytes(picture(1, size))
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "nothing.png").unlink(missing_ok=True)
        (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere")
        prints.add(open_source(f"folder:{tmp_path}").fingerprint())
    assert len(prints) == 2


def test_a_table_that_changes_is_read_again(tmp_path):
    place = f"csv:{tmp_path}/pairs.csv?index={tmp_path}/index"
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\n")
    before = open_source(place)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,another\n")
    after = open_source(place)
    assert (before[0].captions, after[0].captions) == (["one"], ["another"])
    assert before.fingerprint() != after.fingerprint()


def test_a_copy_of_a_large_table_is_small(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "a.png,some words\n" * 20_000)
    source = open_source(f"csv:{tmp_path}/pairs.csv")
    assert len(source) == 20_000
    assert len(pickle.dumps(source)) < 1_000


@pytest.fixture
def parquet_file(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table(
        {
            "image": [{"bytes": picture(number), "path": None} for number in range(10)],
            "caption": [f"number {number}" if number != 4 else None for number in range(10)],
            "texts": [[f"number {number}", "x"] for number in range(10)],
            "label": list(range(10)),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    return tmp_path / "a.parquet"


def test_parquet_as_hugging_face_writes_it(parquet_file):
    source = open_source(f"parquet:{parquet_file}?caption=texts&label=label")
    assert pairs(source) == [(picture(number), (f"number {number}", "x")) for number in range(10)]
    assert source[9].label == "9"
    with pytest.raises(PairError, match="row group 1, row 1 has no caption"):
        open_source(f"parquet:{parquet_file}")[4]


def test_a_parquet_file_that_is_written_anew_is_lost(parquet_file):
    source = open_source(f"parquet:{parquet_file}?caption=texts")
    assert source[0].captions
    parquet_file.write_bytes(parquet_file.read_bytes() + b"x")
    with pytest.raises(ShardError, match=r"a\.parquet has been written anew"):
        source[5]
    parquet_file.unlink()
    with pytest.raises(ShardError, match=r"a\.parquet is gone"):
        source[5]


def test_a_parquet_file_that_is_none_or_lacks_a_column_is_refused(parquet_file, tmp_path):
    with pytest.raises(ValueError, match="has no column 'title', only image, caption, texts, label"):
        open_source(f"parquet:{parquet_file}?caption=title")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"b\.parquet is no Parquet file"):
        open_source(f"parquet:{tmp_path}/b.parquet")


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")
    import io

    class TinyPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
                "label": tfds.features.ClassLabel(names=["even", "odd"]),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(6):
                captions = [{"text": f"number {number}"}, {"text": "x"}]
                yield number, {"image": io.BytesIO(picture(number)), "captions": captions, "label": number % 2}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tensorflow_datasets_are_read_without_tensorflow(tfds_folder):
    import sys

    name = f"tfds:tiny_pairs/train?image=image&text=captions/text&label=label&data_dir={tfds_folder}"
    source = open_source(name)
    assert sorted(pairs(source)) == sorted((picture(number), (f"number {number}", "x")) for number in range(6))
    assert {(pair.captions[0], pair.label) for pair in (source[index] for index in range(6))} == {
        (f"number {number}", ("even", "odd")[number % 2]) for number in range(6)
    }
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("tiny_pairs/test", "no split 'test', only train"),
        ("tiny_pairs", "write tfds:NAME/SPLIT"),
        ("tiny_pairs/train?text=caption", "no field 'caption', only"),
        ("no_such_pairs/train", "no_such_pairs"),
    ],
)
def test_a_mistake_about_tensorflow_datasets_is_one_line(tfds_folder, where, expected):
    mark = "&" if "?" in where else "?"
    with pytest.raises((ValueError, OSError)) as caught:
        open_source(f"tfds:{where}{mark}data_dir={tfds_folder}" if "/" in where else f"tfds:{where}")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def bucket():
    """An S3 server on localhost with one bucket, and fsspec set up for it."""
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
    with pytest.raises(ShardError, match=r"s3://bucket/shards/00001\.tar is gone"):
        source[7]
    with pytest.raises(FileNotFoundError):
        open_source("wds:s3://bucket/shards/{00000..00001}.tar")


def test_a_shard_in_a_bucket_that_is_written_anew_is_indexed_anew(tmp_path, bucket):
    for numbers in (range(3), range(5, 7)):
        write_tar(tmp_path / "a.tar", pair_members(numbers))
        bucket.put(f"{tmp_path}/a.tar", "bucket/a.tar")
        bucket.invalidate_cache()
        source = open_source("wds:s3://bucket/a.tar")
        assert pairs(source) == [(picture(number), (f"number {number}",)) for number in numbers]


def test_a_table_in_a_bucket_names_pictures_beside_it(bucket):
    bucket.pipe("bucket/table/pairs.csv", b"image,caption\nfolder/a.png,words\n")
    bucket.pipe("bucket/table/folder/a.png", picture(3))
    assert pairs(open_source("csv:s3://bucket/table/pairs.csv")) == [(picture(3), ("words",))]


def test_an_address_that_nothing_installed_can_read_says_so():
    with pytest.raises(ValueError, match=r"nonsense:// cannot be read: .*"):
        open_source("wds:nonsense://bucket/a.tar")
