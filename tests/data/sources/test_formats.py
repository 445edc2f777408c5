"""Pairs in JSON lines, Parquet and TensorFlow Datasets are read back."""

import json
import pickle

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from shards import captions_or_reasons, image_bytes

from clip_jax.data.sources import PairError, ShardError, open_source


def pairs(source) -> list[tuple[bytes, tuple[str, ...]]]:
    copy = pickle.loads(pickle.dumps(source))  # as a worker gets it
    return [(copy[index].image, tuple(copy[index].captions)) for index in range(len(copy))]


def test_json_lines_name_images_relative_to_their_file(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(number))
    rows = [{"image": f"{number}.png", "texts": [f"number {number}", "x"], "label": number} for number in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    source = open_source(f"jsonl:{tmp_path}/pairs.jsonl?caption=texts&label=label")
    assert pairs(source) == [(image_bytes(number), (f"number {number}", "x")) for number in range(3)]
    assert source[2].label == "2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1: no JSON: Expecting"),
        ("[1]", "line 1: no object"),
        ("[" * 100_000, "line 1: no JSON"),
        ('{"image": "a.png", "caption": "\\ud800"}', "half a character"),
        ('{"image": "a.png", "caption": {"x": 1}}', "caption is dict, not text"),
        ('{"image": "a\\u0000.png", "caption": "x"}', "null (byte|character)"),
        ('{"image": "nonsense://a.png", "caption": "x"}', "nonsense"),
    ],
)
def test_a_bad_line_is_a_bad_sample_and_the_next_line_is_good(tmp_path, text, expected):
    (tmp_path / "b.png").write_bytes(image_bytes(1))
    (tmp_path / "pairs.jsonl").write_text(f'{text}\n{{"image": "b.png", "caption": "x"}}\n')
    source = open_source(f"jsonl:{tmp_path}/pairs.jsonl")
    with pytest.raises(PairError, match=expected):
        source[0]
    assert source[1].captions == ["x"]


def test_a_table_with_other_options_is_another_source_also_in_a_worker(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "pairs.csv").write_text("image,short,long\na.png,s,l\n")
    both = open_source(f"csv:{tmp_path}/pairs.csv?caption=short + csv:{tmp_path}/pairs.csv?caption=long")
    assert pairs(both) == [(image_bytes(1), ("s",)), (image_bytes(1), ("l",))]


def test_a_field_longer_than_pythons_csv_reader_takes_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "pairs.csv").write_text(f"image,caption\na.png,{'word ' * 40_000}\n")
    assert open_source(f"csv:{tmp_path}/pairs.csv")[0].captions[0].startswith("word word")


def test_a_folders_fingerprint_depends_on_the_images_sizes(tmp_path):
    prints = set()
    for size in (8, 64):
        (tmp_path / "a.png").write_bytes(image_bytes(1, size))
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "nothing.png").unlink(missing_ok=True)
        (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere")
        prints.add(open_source(f"folder:{tmp_path}").fingerprint())
    assert len(prints) == 2


def test_a_changed_table_is_read_again(tmp_path):
    name = f"csv:{tmp_path}/pairs.csv?index={tmp_path}/index"
    (tmp_path / "a.png").write_bytes(image_bytes(1))
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,one\n")
    before = open_source(name)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,another\n")
    after = open_source(name)
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
            "image": [{"bytes": image_bytes(number), "path": None} for number in range(10)],
            "caption": [f"number {number}" if number != 4 else None for number in range(10)],
            "texts": [[f"number {number}", "x"] for number in range(10)],
            "label": list(range(10)),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    return tmp_path / "a.parquet"


def test_parquet_as_hugging_face_writes_it(parquet_file):
    source = open_source(f"parquet:{parquet_file}?caption=texts&label=label")
    assert pairs(source) == [(image_bytes(number), (f"number {number}", "x")) for number in range(10)]
    assert source[9].label == "9"
    with pytest.raises(PairError, match="row group 1, row 1 has no caption"):
        open_source(f"parquet:{parquet_file}")[4]


def test_a_changed_parquet_file_is_lost(parquet_file):
    source = open_source(f"parquet:{parquet_file}?caption=texts")
    assert source[0].captions
    parquet_file.write_bytes(parquet_file.read_bytes() + b"x")
    with pytest.raises(ShardError, match=r"a\.parquet has changed since the start"):
        source[5]
    parquet_file.unlink()
    with pytest.raises(ShardError, match=r"a\.parquet no longer exists"):
        source[5]


def test_a_damaged_parquet_file_or_one_without_the_column_is_refused(parquet_file, tmp_path):
    with pytest.raises(ValueError, match="has no column 'title', only image, caption, texts, label"):
        open_source(f"parquet:{parquet_file}?caption=title")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"b\.parquet is not a Parquet file"):
        open_source(f"parquet:{tmp_path}/b.parquet")


CLASSES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


def write_parquet(file, columns: dict, features: dict | None = None):
    """Writes a file as Hugging Face's datasets do, with the features in the schema's metadata."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"image": [{"bytes": image_bytes(n), "path": None} for n in range(4)]} | columns)
    if features:
        metadata = json.dumps({"info": {"features": features}}).encode()
        table = table.replace_schema_metadata({b"huggingface": metadata})
    parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("caption=&label=one", [["cat"], ["dog"], "empty_caption", "damaged_record"]),
        ("caption=one", [["cat"], ["dog"], "empty_caption", "damaged_record"]),
        ("caption=several", [["cat", "dog"], ["dog"], "empty_caption", "empty_caption"]),
        ("caption=older", [["cat", "dog"], ["dog"], "empty_caption", "empty_caption"]),
        ("caption=deep.one", [["cat"], ["dog", "cat"], "empty_caption", "empty_caption"]),
        ("caption=plain", ["damaged_record"] * 4),
        ("caption=&label=plain", [["0"], ["1"], ["0"], ["1"]]),
    ],
)
def test_numbers_of_hugging_faces_classes_become_their_names(tmp_path, options, expected):
    several = [[0, 1], [1], [], None]
    columns = {"one": [0, 1, -1, 7], "several": several, "older": several, "plain": [0, 1, 0, 1]}
    columns["deep"] = [{"one": [0]}, {"one": [1, 0]}, {"one": [-1]}, None]
    features = {"one": CLASSES, "several": {"feature": CLASSES, "_type": "Sequence"}, "older": [CLASSES]}
    features["deep"] = {"feature": {"one": CLASSES}, "_type": "Sequence"}
    write_parquet(tmp_path / "a.parquet", columns, features)
    source = open_source(f"parquet:{tmp_path}/a.parquet?{options}")
    assert captions_or_reasons(pickle.loads(pickle.dumps(source))) == expected
    if "label" in options:
        assert source[1].label == expected[1][0]
    assert source.notes()[0].startswith("not used: columns ")


def test_files_that_name_classes_differently_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"one": [0, 1, 0, 1]}, {"one": CLASSES})
    write_parquet(tmp_path / "b.parquet", {"one": [0, 1, 0, 1]})
    with pytest.raises(ValueError, match=r"b\.parquet and .*a\.parquet name the classes of one differently"):
        open_source(f"parquet:{tmp_path}/*.parquet?caption=one")


def test_missing_values_in_parquet_are_bad_samples_and_unused_columns_are_named(tmp_path):
    image = [
        None,
        {"bytes": None, "path": "a.png"},
        {"bytes": image_bytes(1), "path": None},
        {"bytes": b"", "path": "b"},
    ]
    columns = {"image": image, "caption": ["a", "b", None, "d"], "texts": [["a"], ["b"], ["c", None], [None]]}
    columns |= {"caption.en": ["x"] * 4, "width": [1] * 4}
    write_parquet(tmp_path / "a.parquet", columns)
    source = open_source(f"parquet:{tmp_path}/a.parquet")
    assert captions_or_reasons(source) == ["no_image", "no_image", "empty_caption", ["d"]]
    assert source.notes() == ["not used: columns texts, caption.en, width"]
    with pytest.raises(PairError, match=r"no image bytes in image, only the path a\.png"):
        source[1]
    source = open_source(f"parquet:{tmp_path}/a.parquet?caption=texts,caption.en&image=image")
    assert captions_or_reasons(source)[2:] == [["c", "x"], ["x"]]
    assert "caption.en is the column of that name, not the entry en of caption" in source.notes()


def test_unused_fields_of_array_records_are_named(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "pairs"), "group_size:1")
    for record in ({"image": b"x", "captions": ["a"], "url": "u", "json": '{"alt": "b"}'}, [1], {"captions": ["a"]}):
        writer.write(msgpack.packb(record))
    writer.close()
    source = open_source(f"array_record:{tmp_path}/pairs?caption=json.alt,captions")
    assert captions_or_reasons(source) == [["b", "a"], "damaged_record", "no_image"]
    assert source.notes() == ["not used: fields url (1 of 3 records)"]


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
                yield number, {"image": io.BytesIO(image_bytes(number)), "captions": captions, "label": number % 2}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def test_tensorflow_datasets_are_read_without_tensorflow(tfds_folder):
    import sys

    name = f"tfds:tiny_pairs/train?image=image&text=captions/text&label=label&data_dir={tfds_folder}"
    source = open_source(name)
    assert sorted(pairs(source)) == sorted((image_bytes(number), (f"number {number}", "x")) for number in range(6))
    assert {(pair.captions[0], pair.label) for pair in (source[index] for index in range(6))} == {
        (f"number {number}", ("even", "odd")[number % 2]) for number in range(6)
    }
    assert source.notes() == []
    named = open_source(f"tfds:tiny_pairs/train?caption=label&data_dir={tfds_folder}")
    assert {pair[1] for pair in pairs(named)} == {("even",), ("odd",)}
    assert named.notes() == ["not used: features captions"]
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
