"""A folder like a fresh clone in which a reader would type what the documents say, with small stand-ins.

The command lines run verbatim. The files that they name are small: each config keeps its values except for a tiny
model, two steps and one task, and ``ViT-B-32.pt`` is a tiny model in OpenAI's format. ``/data`` and the like are
folders below a temporary one: the clone's ``python`` rewrites such paths in its arguments and runs this interpreter.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
from array_record.python.array_record_module import ArrayRecordWriter
from goldens import unpack
from grain.sources import ArrayRecordDataSource
from PIL import Image
from shards import image_bytes, pair_members, write_tar
from trial import QUICK_COMPILATION
from warm_python import warm_python

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
DEADLINE = 300  # seconds for one block
EMOJI_KEPT = 40  # of each style and split
MEASUREMENT = "WARM_UP, MEASURED = 3.0, 10.0"
ROOTS = ("data", "mnt", "content", "usr/share/openclipart", "pairs.csv")

SMALLER = """

_published = get_config


def get_config():
    config = _published()
    config.global_batch_size, config.steps, config.log_every, config.eval_every = 8, 2, 1, 0
    config.evaluation.tasks = config.evaluation.tasks and "emoji_unseen_both"
    for name in config.data.augmentation:
        config.data.augmentation[name] = 0.0
    config.data.num_workers = 0
    # The same in all, so that models of the same shape have the same program, which is then compiled once.
    config.optimizer.update(warmup_steps=1, learning_rate=1e-3)
    config.model.update(embed_dim=16, dtype="float32", scan_unroll=1, remat="none")
    # OpenAI's format has heads 64 wide; a pod of processes on busy cores is slow to add up the gradients of so many.
    width = 16 if config.model.name == "ViT-tiny" else 64
    config.model.text.update(width=width, num_layers=1, num_heads=1, context_length=16)
    vision = config.model.vision
    size = 24 if vision.image_size == 336 else 16
    if "stage_sizes" in vision:
        vision.update(image_size=32, width=4, num_heads=2, stage_sizes=(1, 1, 1, 1))
    else:
        vision.update(image_size=size, patch_size=8, width=width, num_layers=1, num_heads=1)
    return config
"""

PYTHON = """#!{python} -SI
import os, re, sys
words = [re.sub(r"(?<![\\w.~/])/(?=({roots})\\b)", "{root}/", word) for word in sys.argv[1:]]
os.execv("{warm}", ["{warm}", *words])
"""

# Checks what would be installed, without a package index.
PIP = """#!{python} -SI
import re, sys
known = re.findall(r'^ +"(\\w+)": \\[', open("setup.py").read(), re.M)
wanted = [word for word in sys.argv[2:] if not word.startswith("-")]
for word in wanted:
    project, _, extras = word.rstrip("]").partition("[")
    assert project in (".", "clip-jax-tpu"), word
    assert all(extra in known for extra in extras.split(",") if extra), (word, known)
assert sys.argv[1] == "install" and wanted
"""

SVG = """<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about=""><dc:title>{title}</dc:title>
<cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/></cc:Work></rdf:RDF></metadata></svg>"""


def keep_first_records(file: pathlib.Path, count: int) -> None:
    records = ArrayRecordDataSource([str(file)]).__getitems__(range(count))
    file.unlink()
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


class Clone:
    """``folder`` is the clone, ``home`` the reader's home and ``root`` what stands in for ``/``."""

    def __init__(self, parent: pathlib.Path):
        self.folder, self.home, self.root = parent / "clip_jax", parent / "home", parent / "root"
        self._copy_files()
        self._shorten_what_ships()
        self._write_programs(parent / "bin")
        # Not PYTHON as a whole: with other settings than those of its server, each process of warm_python starts anew.
        gone = ("PYTEST", "PYTHONPATH", "XLA")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(gone)}
        self.environment = kept | {
            "XLA_FLAGS": QUICK_COMPILATION,
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            "PATH": f"{parent / 'bin'}:{os.environ['PATH']}",
        }
        self._write_data()
        self._write_models(parent)

    def run(self, block: str) -> subprocess.CompletedProcess:
        """Runs the lines of a block as a shell does, up to the first that fails."""
        return subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
        )

    def _must_run(self, block: str) -> None:
        done = self.run(block)
        assert done.returncode == 0, done.stdout

    def _copy_files(self) -> None:
        listed = subprocess.run(
            ["git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        )
        for name in filter(None, listed.stdout.split("\0")):
            if not name.startswith("tests/") and (REPOSITORY / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, self.folder / name)
        for config in (self.folder / "configs").glob("*.py"):
            config.write_text(config.read_text() + SMALLER)
        (self.folder / "tests").mkdir()  # in place of all, which `make test` would run
        (self.folder / "tests/test_one.py").write_text("def test_one():\n    import clip_jax\n")

    def _shorten_what_ships(self) -> None:
        """Fewer emoji to decode, and a shorter measurement of the input pipeline."""
        for file in (self.folder / "clip_jax/data/emoji").glob("*.array_record"):
            keep_first_records(file, EMOJI_KEPT)
        inspection = self.folder / "clip_jax/data/inspection.py"
        text = inspection.read_text()
        assert text.count(MEASUREMENT) == 1
        inspection.write_text(text.replace(MEASUREMENT, "WARM_UP, MEASURED = 0.1, 0.1"))

    def _write_programs(self, folder: pathlib.Path) -> None:
        values = {"python": sys.executable, "warm": warm_python(), "root": self.root, "roots": "|".join(ROOTS)}
        environment = self.folder / ".venv"
        for path, text in [
            (folder / "python", PYTHON),
            (folder / "pip", PIP),
            (environment / "bin/python", PYTHON),
        ]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(**values))
            path.chmod(0o755)
        for extras in ("base", "test"):  # what make finds installed already
            (environment / f".{extras}").touch()

    def _write_data(self) -> None:
        data = self.root / "data"
        (data / "laion").mkdir(parents=True)
        for number in range(100):
            write_tar(data / f"{number:05}.tar", pair_members(range(number, number + 1)))
            (data / "laion" / f"{number:05}.tar").symlink_to(data / f"{number:05}.tar")
        (self.root / "mnt/shared").mkdir(parents=True)
        self.home.mkdir()
        (self.home / "data").symlink_to(data)
        rows = {"image": [image_bytes(number) for number in range(40)], "caption": [f"number {n}" for n in range(40)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), data / "0.parquet")
        lines = ["image,caption"]
        (self.root / "images").mkdir()
        for number in range(20):
            (self.root / f"images/{number}.png").write_bytes(image_bytes(number))
            lines.append(f"images/{number}.png,number {number}")
        (self.root / "pairs.csv").write_text("\n".join(lines) + "\n")
        self._write_flickr(data / "flickr30k")
        self._write_clip_art(self.root / "usr/share/openclipart")

    @staticmethod
    def _write_flickr(folder: pathlib.Path) -> None:
        folder.mkdir()
        images = [
            {"filename": f"{n}.png", "split": "test", "sentences": [{"raw": f"{n} {k}"} for k in range(5)]}
            for n in range(3)
        ]
        for number, entry in enumerate(images):
            (folder / entry["filename"]).write_bytes(image_bytes(number))
        (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))

    @staticmethod
    def _write_clip_art(folder: pathlib.Path) -> None:
        for kind in ("png", "svg"):
            (folder / kind / "animals").mkdir(parents=True)
        for number, title in enumerate(("Red bird", "Black cat", "Dog")):
            (folder / f"png/animals/{title}.png").write_bytes(image_bytes(number))
            (folder / f"svg/animals/{title}.svg").write_text(SVG.format(title=title))

    def _write_models(self, parent: pathlib.Path) -> None:
        Image.new("RGB", (40, 30), "red").save(self.folder / "photo.png")
        task = {"name": "few", "kind": "zero_shot", "source": "emoji:noto/held_out", "prompts": "emoji"}
        (parent / "few.json").write_text(json.dumps(task))
        resnet = unpack(parent / "goldens")["openai_resnet/archive"].path
        self._must_run(
            f"""python -m clip_jax.main --config=configs/vit_l14.py "--config.data.source=wds:/data/*.tar"
            cp -r runs/vit_l14 runs/vit_b32
            cp -r runs/vit_l14 runs/quickstart
            python -m clip_jax.convert runs/vit_l14 ViT-B-32.pt --to=openai
            python -m clip_jax.convert {resnet} runs/rn50
            python -m clip_jax.evaluate --model=runs/vit_l14 --tasks={parent}/few.json --output=evaluations/one
            cp -r evaluations/one evaluations/other"""
        )
