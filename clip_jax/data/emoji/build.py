"""Builds the data set in this package: emoji images in eight styles, with captions made of their names and keywords.

    pip install -e ".[dev]"
    python -m clip_jax.data.emoji.build

downloads the npm packages below at fixed versions (``npm`` must be installed), and writes one ArrayRecord file per
style and split and ``concepts.json``, the list of all concepts, to its own folder. The concepts are those that Noto,
Twemoji, OpenMoji and emojibase all have; the other styles have some of them. The same packages give the same bytes.

A record is a msgpack map of ``key`` (the emoji's code points), ``image`` (lossless WebP, RGB on white, 64 x 64 pixels,
or 36 x 36 in the styles from Iconify), ``captions`` and ``label``, for
:class:`clip_jax.data.sources.ArrayRecordSource`.
"""

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import tempfile

import msgpack
from array_record.python import array_record_module
from PIL import Image

from clip_jax.data.emoji.iconify import Names, drawings, without_variation_selector

PACKAGES = {
    "emoji-datasource-google": "16.0.0",  # Noto Emoji, Apache-2.0
    "emoji-datasource-twitter": "16.0.0",  # Twemoji, CC-BY 4.0
    "openmoji": "17.0.0",  # OpenMoji, CC BY-SA 4.0
    "emojibase-data": "17.0.0",  # names and keywords, MIT
    "@iconify-json/fluent-emoji-flat": "1.2.6",  # Fluent Emoji, MIT
    "@iconify-json/fluent-emoji": "1.2.3",  # Fluent Emoji, MIT; later versions lack chars.json
    "@iconify-json/emojione": "1.2.3",  # EmojiOne 2, CC BY 4.0
    "@iconify-json/fxemoji": "1.2.2",  # Firefox OS Emoji, artwork under CC BY 4.0
    "@iconify-json/noto-v1": "1.2.5",  # Noto Emoji before Android 8, Apache-2.0
}
ICONIFY_STYLES = {
    "fluent_flat": "fluent-emoji-flat",
    "fluent_color": "fluent-emoji",
    "emojione": "emojione",
    "fxemoji": "fxemoji",
    "noto_v1": "noto-v1",
}
IMAGE_SIZE = 64
ICONIFY_SIZE = 36  # with 40 all files would be more than 25 MB
HELD_OUT_ONE_IN = 10
COMPONENT_GROUP = 2  # emojibase's group of skin-tone and hair swatches, which are parts of emoji


def is_held_out(key: str) -> bool:
    """Whether no style trains on a concept: one in ten, chosen by its code points."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def captions_of(name: str, keywords: list[str]) -> list[str]:
    """Returns the name, and sentences made from it and the keywords. Every caption contains the name."""
    extra = [word for word in keywords if word.lower() not in name.lower()]
    captions = [
        name,
        f"an emoji of {name}",
        f"a drawing of {name}",
        f"a small picture that means {name}",
    ]
    captions += [f"{name}, {word}" for word in extra[:6]]
    captions += [f"{first} and {second}: {name}" for first, second in zip(extra[::2], extra[1::2], strict=False)][:3]
    if len(extra) >= 3:
        captions.append(f"{name}. Keywords: {', '.join(extra[:5])}")
    return captions


def on_white(image: Image.Image, size: int) -> Image.Image:
    """Resizes an image to ``size`` x ``size`` pixels and composites it on white."""
    image = image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def as_webp(image: Image.Image, size: int) -> bytes:
    """Encodes an image on white as lossless WebP of ``size`` x ``size`` pixels."""
    stream = io.BytesIO()
    on_white(image, size).save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue()


def render(size: int, **svg: str) -> Image.Image:
    """Renders the SVG file ``svg_path`` or the SVG text ``svg_string`` for an image of ``size`` pixels."""
    import resvg_py  # only the extra "dev" installs it

    # Four times the final size, so that the downscale does the antialiasing as it did for the other styles.
    png = resvg_py.svg_to_bytes(**svg, width=4 * size, height=4 * size)
    return Image.open(io.BytesIO(bytes(png)))


def download(folder: pathlib.Path) -> None:
    """Downloads and unpacks the npm packages that the folder lacks."""
    for name, version in PACKAGES.items():
        if (folder / name).is_dir():
            continue
        archive = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, text=True, stdout=subprocess.PIPE
        ).stdout.strip()
        (folder / name).mkdir(parents=True)
        subprocess.run(
            ["tar", "xzf", archive, "-C", name, "--strip-components=1", "--no-same-owner"], cwd=folder, check=True
        )


def write_style(style: str, images: dict[str, bytes], names: dict[str, dict], output: pathlib.Path) -> None:
    """Writes the two files of a style: training concepts and held-out concepts."""
    for split, held_out in (("train", False), ("held_out", True)):
        chosen = [key for key in images if is_held_out(key) == held_out]
        path = output / f"{style}-{split}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,zstd:19")
        for key in chosen:
            label = names[key]["label"]
            captions = captions_of(label, names[key].get("tags", []))
            record = {"key": key, "image": images[key], "captions": captions, "label": label}
            writer.write(msgpack.packb(record))
        writer.close()
        print(f"{path.name}: {len(chosen)} pairs, {path.stat().st_size / 1e6:.1f} MB")


def build(packages: pathlib.Path, output: pathlib.Path) -> None:
    """Writes the records and ``concepts.json`` from the unpacked npm packages."""

    def read_json(path: str):
        return json.loads((packages / path).read_text(encoding="utf-8"))

    def datasource(name: str, style: str) -> dict[str, pathlib.Path]:
        folder = packages / name / "img" / style / "64"
        return {
            without_variation_selector(entry["unified"]): folder / entry["image"]
            for entry in read_json(f"{name}/emoji.json")
            if entry[f"has_img_{style}"]
        }

    noto = datasource("emoji-datasource-google", "google")
    twemoji = datasource("emoji-datasource-twitter", "twitter")
    openmoji = {without_variation_selector(path.stem): path for path in (packages / "openmoji/color/svg").glob("*.svg")}
    names = {
        without_variation_selector(entry["hexcode"]): entry
        for entry in read_json("emojibase-data/en/data.json")
        if entry.get("group") not in (None, COMPONENT_GROUP)
    }
    keys = sorted(set(noto) & set(twemoji) & set(openmoji) & set(names), key=lambda key: names[key]["order"])

    # Mistakes in icon_names.json end the script here, before minutes of rendering.
    lookup = Names({key: names[key]["label"] for key in keys}, read_json("emojibase-data/meta/unicode-names.json"))
    svgs = {
        style: drawings(packages / "@iconify-json" / package, style, lookup)
        for style, package in ICONIFY_STYLES.items()
    }
    styles = {
        "noto": {key: as_webp(Image.open(noto[key]), IMAGE_SIZE) for key in keys},
        "twemoji": {key: as_webp(Image.open(twemoji[key]), IMAGE_SIZE) for key in keys},
        "openmoji": {key: as_webp(render(IMAGE_SIZE, svg_path=str(openmoji[key])), IMAGE_SIZE) for key in keys},
    }
    for style, texts in svgs.items():
        styles[style] = {
            key: as_webp(render(ICONIFY_SIZE, svg_string=texts[key]), ICONIFY_SIZE) for key in keys if key in texts
        }
    for style, images in styles.items():
        write_style(style, images, names, output)

    groups = {int(number): name for number, name in read_json("emojibase-data/meta/groups.json")["groups"].items()}
    concepts = [
        {
            "key": key,
            "name": names[key]["label"],
            "group": groups[names[key]["group"]],
            "held_out": is_held_out(key),
        }
        for key in keys
    ]
    lines = ",\n".join(json.dumps(concept, ensure_ascii=False) for concept in concepts)
    (output / "concepts.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"concepts.json: {len(concepts)} concepts, {sum(c['held_out'] for c in concepts)} held out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=pathlib.Path, help="folder with the unpacked npm packages, kept and reused")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        packages = arguments.packages or pathlib.Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        download(packages)
        build(packages, arguments.output)


if __name__ == "__main__":
    main()
