"""Drawings get their captions from the metadata of the SVGs; drawings without usable metadata are left out."""

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clip_jax.data.openclipart import LICENSE, PARTS, Metadata, OpenClipart, captions_of, name_of, read_metadata
from clip_jax.data.sources import PairError

PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><title>not this one</title><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>Ann Other</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="{license}"/></cc:Work></rdf:RDF></metadata></svg>"""


class Library:
    """A small library in two folders. Each drawing has its own color."""

    def __init__(self, root):
        self.png, self.svg, self._count = root / "png", root / "svg", 0

    def add(self, path, title, keywords=(), rights=PUBLIC_DOMAIN, color=None):
        self._count += 1
        for folder, suffix in ((self.png, "png"), (self.svg, "svg")):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            file = folder / f"{path}.{suffix}"
            if suffix == "svg":
                items = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
                file.write_text(SVG.format(title=title, keywords=items, license=rights))
            else:
                Image.new("RGBA", (3, 3), (color or self._count, self._count // 256, 0, 128)).save(file)

    def open(self, part="all"):
        return OpenClipart(self.png, self.svg, part)


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path)


def reasons(source):
    found = Counter()
    for index in range(len(source)):
        try:
            found[source[index].key] += 1
        except PairError as error:
            found[error.reason] += 1
    return found


def test_a_drawing_has_captions_from_title_keywords_and_category_and_keeps_its_transparency(library):
    library.add(
        "signs_and_symbols/arki_01", "Red\n Arrow", ["", "arrow", "hash", "north", "map_symbol", "north", "Ann Other"]
    )
    pair = library.open()[0]
    assert pair.key == "signs_and_symbols/arki_01"
    assert pair.label == "signs and symbols"
    assert pair.captions == [
        "Red Arrow",
        "clip art of Red Arrow",
        "a drawing of Red Arrow",
        "Red Arrow, north",
        "Red Arrow, map symbol",
        "Red Arrow. Keywords: north, map symbol",
        "Red Arrow (signs and symbols)",
    ]
    assert Image.open(io.BytesIO(pair.image)).mode == "RGBA"


def test_unusable_drawings_have_a_reason(library):
    library.add("animals/cat_v0.1", "Cat")
    library.add("animals/dog", "Dog", rights="http://creativecommons.org/licenses/GPL/2.0/")
    library.add("animals/emu", "")
    library.add("animals/fox", "Fox", color=7)
    library.add("animals/fox_again", "Fox", color=7)
    (library.png / "animals/fox_again.png").write_bytes((library.png / "animals/fox.png").read_bytes())
    library.add("animals/gnu", "Gnu")
    (library.svg / "animals/gnu.svg").write_text("<svg")
    library.add("animals/hen", "Hen")
    (library.svg / "animals/hen.svg").unlink()
    for number in range(22):
        library.add(f"animals/ibis_{number}", "Ibis")
    assert reasons(library.open()) == {
        "animals/cat_v0.1": 1,
        "not_public_domain": 1,
        "no_title": 1,
        "animals/fox": 1,
        "duplicate_image": 1,
        "damaged_record": 2,
        "too_many_alike": 2,
    } | {f"animals/ibis_{number}": 1 for number in sorted(range(22), key=str)[:20]}


@pytest.mark.parametrize(
    ("title", "file_name", "shared", "name"),
    [
        ("Bengal Tiger", "tigre_01", False, "Bengal Tiger"),
        ("AK47", "ak47_01", False, "AK47"),
        ("Clipart by Nicu Buculei - bee", "bee1", False, "bee"),
        ("Lemon SVG theme", "file_broken", True, "file broken"),
        ("advertising", "RadiationsIonisantes", True, "radiations ionisantes"),
        ("Bullet Hole", "bullet_hole_ann_other_z", True, "bullet hole"),
        ("stick man", "sm_013", True, "stick man"),
        ("Clipart by Nicu Buculei - fc23", "fc28", True, ""),
        ("", "hummer_02", True, "hummer"),
        ("", "hummer_02", False, ""),
    ],
)
def test_the_file_name_replaces_a_title_that_many_drawings_share(title, file_name, shared, name):
    assert name_of(Metadata(title, [], "Ann Other", PUBLIC_DOMAIN), file_name, shared) == name


@given(
    st.text(min_size=1), st.lists(st.text(min_size=1)), st.sampled_from(["animals", "unsorted", "signs_and_symbols"])
)
def test_captions_differ_and_contain_the_name(name, keywords, category):
    captions = captions_of(name, keywords, category)
    assert captions[0] == name
    assert all(name in caption for caption in captions)
    assert len(set(captions)) == len(captions) <= 9


def test_the_fingerprint_changes_with_images_and_texts(library):
    library.add("animals/cat", "Cat", color=1)
    fingerprints = {library.open().fingerprint(), library.open().fingerprint()}
    assert len(fingerprints) == 1
    library.add("animals/cat", "Cat", color=2)
    fingerprints.add(library.open().fingerprint())
    library.add("animals/cat", "Cat", ["pet"], color=2)
    fingerprints.add(library.open().fingerprint())
    assert len(fingerprints) == 3


def test_metadata_may_be_missing(tmp_path):
    (tmp_path / "plain.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    assert read_metadata(tmp_path / "plain.svg") == Metadata("", [], "", "")


def test_missing_folders_are_named(tmp_path, library):
    with pytest.raises(FileNotFoundError, match="no folder"):
        OpenClipart(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match=r"no \.png below"):
        OpenClipart(tmp_path, tmp_path)


def test_the_license_is_the_public_domain():
    assert "public domain" in LICENSE


def test_a_tenth_of_the_names_is_held_out_and_the_parts_share_no_name(library):
    for number in range(120):
        name = f"thing {number}".translate(str.maketrans("0123456789", "abcdefghij"))
        for copy in ("one", "two"):
            library.add(f"things/{number}_{copy}", name)
    library.add("things/nameless", "")
    keys, names = {}, {}
    for part in PARTS:
        source = library.open(part)
        pairs = [source[index] for index in range(len(source)) if "nameless" not in source._entries[index].path]
        keys[part], names[part] = {pair.key for pair in pairs}, {pair.captions[0] for pair in pairs}
    assert len(keys["all"]) == 240
    assert keys["train"] | keys["held_out"] == keys["all"]
    assert not names["train"] & names["held_out"]
    assert 5 <= len(names["held_out"]) <= 30
    assert len(keys["held_out"]) == 2 * len(names["held_out"])
    assert len({library.open(part).fingerprint() for part in PARTS}) == 3
    assert sum(reasons(library.open(part))["no_title"] for part in ("train", "held_out")) == 1


def test_an_unknown_part_is_refused(library):
    library.add("things/pear", "pear")
    with pytest.raises(ValueError, match="no part 'test' of the clip art; the parts are all, train, held_out"):
        library.open("test")
