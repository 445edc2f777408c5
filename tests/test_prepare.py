"""The command line inspects, converts and measures pairs, and continues interrupted conversions."""

import functools
import html.parser
import io
import json
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import trial
from PIL import Image

from clip_jax import prepare
from clip_jax.data import inspection
from clip_jax.data.records import Settings, write_records
from clip_jax.data.sources import Pair, PairError, open_source

EMOJI = "emoji:noto,openmoji/held_out"  # each key twice, so the shards of the second half are written twice
CONVERT = ("--pairs-per-shard=20", "--image-size=40", "--workers=2")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "clip_jax.prepare", *arguments],
        cwd=trial.REPOSITORY,
        env=trial.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def without_progress(errors: str) -> str:
    """Removes progress lines, which a slow machine prints every few seconds."""
    return re.sub(r"^[\d,]+ of [\d,]+ pairs .*\n", "", errors, flags=re.MULTILINE)


def workers_of(process: subprocess.Popen) -> list[int]:
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(child): pathlib.Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def wait_until(happened, process: subprocess.Popen) -> None:
    end = time.monotonic() + trial.DEADLINE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_kills_at_random_moments_change_nothing(tmp_path):
    undisturbed, folder, moments = tmp_path / "undisturbed", tmp_path / "killed", random.Random(0)
    write_records(open_source(EMOJI), EMOJI, undisturbed, Settings(pairs_per_shard=20, image_size=40))
    whole: dict[pathlib.Path, int] = {}
    for alone in (False, True):
        process = start("convert", EMOJI, str(folder), *CONVERT)
        notes = len(list(folder.glob("parts/*.note")))
        wait_until(lambda notes=notes: len(list(folder.glob("parts/*.note"))) >= notes + 2, process)
        time.sleep(moments.uniform(0, 0.05))
        if alone:  # the workers have to notice
            workers = workers_of(process)
            process.kill()
            process.wait()
            end = time.monotonic() + 20
            while any(pathlib.Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
                assert time.monotonic() < end, "a worker outlives the program"
                time.sleep(0.01)
        trial.kill(process)
        assert not (folder / "manifest.json").exists()
        assert all(path.stat().st_mtime_ns == written for path, written in whole.items()), "a whole shard is new"
        # The first half: what comes later is written again for its repeated keys.
        noted = [folder / f"pairs-{note.stem}.array_record" for note in folder.glob("parts/[!.]*.note")]
        whole = {path: path.stat().st_mtime_ns for path in noted if int(path.stem.split("-")[1]) < 10}
    assert len(whole) >= 4
    process = start("convert", EMOJI, str(folder), *CONVERT)
    output = trial.finish(process)
    assert process.returncode == 0, output
    assert all(path.stat().st_mtime_ns == written for path, written in whole.items()), "a whole shard is new"
    assert contents(folder) == contents(undisturbed)


def test_a_killed_worker_is_reported_in_one_line(tmp_path):
    process = start("convert", EMOJI, str(tmp_path / "out"), *CONVERT)
    wait_until(lambda: list((tmp_path / "out").glob("parts/*.note")), process)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=trial.DEADLINE)
    assert process.returncode == 1
    reason = "a worker process was killed, perhaps for lack of memory; run the command again to continue"
    assert without_progress(errors) == f"failed: {reason}\n"


def test_ctrl_c_ends_a_conversion_at_once_with_one_line(tmp_path):
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background processes ignore SIGINT
    process = start("convert", "emoji:noto,twemoji,openmoji/all", str(tmp_path / "out"), *CONVERT, preexec_fn=heard)
    wait_until(lambda: list((tmp_path / "out").glob("parts/*.note")), process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers as well
    _, errors = process.communicate(timeout=trial.DEADLINE)
    assert process.returncode == 3
    assert without_progress(errors) == "interrupted; the same command continues from here\n"
    assert not list((tmp_path / "out/parts").glob(".unfinished-*-pairs-*"))


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (200_000, 200_000))
    process = start("convert", EMOJI, str(tmp_path / "out"), "--workers=2", "--pairs-per-shard=205", preexec_fn=limit)
    _, errors = process.communicate(timeout=trial.DEADLINE)
    assert process.returncode == 1
    expected = f"failed: {tmp_path}/out: write() failed: File too large; the same command continues from here\n"
    assert without_progress(errors) == expected
    assert not list((tmp_path / "out/parts").glob(".unfinished-*"))


def test_convert_prints_what_it_wrote_and_how_to_train_on_it(tmp_path, capsys):
    arguments = ["convert", "emoji:noto/held_out", str(tmp_path / "out"), "--workers=1", "--license=Apache-2.0"]
    assert prepare.main(arguments) == 0
    output, errors = capsys.readouterr()
    assert re.match(r"205 pairs, 1,752 captions, 0\.\d MB in 1 shards below ", output)
    source = re.search(r'--config\.data\.source="(.+)"', output)[1]
    assert len(open_source(source)) == 205
    assert errors.startswith("205 of 205 pairs  100%")
    assert json.loads((tmp_path / "out/manifest.json").read_text())["license"] == "Apache-2.0"


def test_openclipart_becomes_shards(tmp_path, capsys):
    for folder, suffix in (("png", ".png"), ("svg", ".svg")):
        (tmp_path / folder / "food").mkdir(parents=True)
        for name in ("pear", "plum"):
            (tmp_path / folder / "food" / f"{name}{suffix}").write_bytes(b"<svg/>")
    Image.new("RGBA", (5, 5)).save(tmp_path / "png/food/pear.png")
    (tmp_path / "svg/food/pear.svg").write_text(
        '<svg xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work><dc:title>A pear</dc:title>'
        '<cc:license rdf:resource="http://web.resource.org/cc/PublicDomain"/></cc:Work></svg>'
    )
    folders = [str(tmp_path / folder) for folder in ("png", "svg", "out")]
    assert prepare.main(["openclipart", *folders, "--workers=1"]) == 0
    assert "left out: not_public_domain 1 (listed in" in capsys.readouterr().out
    assert open_source(f"array_record:{folders[2]}/pairs-*")[0].captions[0] == "A pear"
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["license"].startswith("public domain") and manifest["conversion"]["source"] == "openclipart"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["conver"], "invalid choice: 'conver'"),
        (["convert", "emoji:noto/all"], "the following arguments are required: OUTPUT"),
        (["convert", "emoji:noto/all", "out", "--worker=2"], "unknown argument --worker=2"),
        (["convert", "emoji:noto/all", "out", "--workers=0"], "argument --workers: 0 must be a whole number above 0"),
        (["convert", "emoji:noto/all", "out", "--image-size=a"], "--image-size: a must be a whole number above 0"),
        (["convert", "emoji:noto/all", "out", "--quality=101"], "argument --quality: 101 must be in [1, 100]"),
        (["convert", "emojis", "out"], "'emojis' is not a source"),
        (["convert", "folder:/nowhere/at/all", "out"], "no folder /nowhere/at/all"),
        (["convert", "emoji:noto/all", __file__], f"{__file__}: "),
        (["convert", "emoji:noto/all", f"{__file__}/out"], f"{__file__}/out"),
        (["openclipart", "/nowhere", "/nowhere", "out"], "no folder /nowhere"),
        (["inspect", "emoji:noto/all", "--samples=0"], "argument --samples: 0 must be a whole number above 0"),
        (["inspect", "emoji:noto/held_out", "--samples=1", f"--sheet={__file__}/a"], f"{__file__}/a: Not a directory"),
        (["bench", "emoji:noto/all"], "the following arguments are required: --config"),
        (["bench", "emoji:noto/all", "--config=nowhere.py"], "no config file 'nowhere.py'"),
        (["bench", "emoji:noto/all", "--config=quickstart", "--config.steps=a"], "steps=a: must be a whole number"),
        (["bench", "emoji:noto/all", "--config=quickstart", "--samples=2"], "unknown argument --samples=2"),
        (["bench", "emoji:noto/all", "--config=quickstart", "--pairs-per-second=nan"], "nan must be a number above 0"),
        (["bench", "nothing", "--config=quickstart"], "'nothing' is not a source"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, line, capsys):
    assert prepare.main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    [printed] = errors.splitlines()
    assert printed.startswith("error: ") and line in printed


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_write_permission_is_one_line(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert prepare.main(["convert", "emoji:noto/held_out", str(tmp_path / "out"), "--workers=1"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: Permission denied\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_a_few_lines_elsewhere(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    terminal, file = Terminal(), io.StringIO()
    lines = [prepare.ProgressLine(terminal), prepare.ProgressLine(file)]
    for done in range(0, 4_001, 1_000):
        for line in lines:
            line(done, 4_000)
        clock[0] += 8
    assert terminal.getvalue().split("\r\x1b[K")[1] == "1,000 of 4,000 pairs  25%  125 pairs/s  0:00:24 left"
    assert terminal.getvalue().count("\n") == 1
    assert file.getvalue().splitlines() == [
        "2,000 of 4,000 pairs  50%  125 pairs/s  0:00:16 left",
        "4,000 of 4,000 pairs  100%  125 pairs/s  0:00:00 left",
    ]


class Mixed:
    """Three hundred pairs. Of six, one is damaged and one undecodable. Captions have HTML and control characters."""

    caption = "</li><script>alert('&')</script> \"quoted\" \x1b[2J" + "!" * 200

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> Pair:
        if index % 6 == 0:
            raise PairError(f"record {index} is damaged", "damaged_record")
        stream = io.BytesIO()
        Image.new("RGB", (10 + index, 400), "red").save(stream, "JPEG" if index % 2 else "PNG")
        image = stream.getvalue() if index % 6 != 1 else b"broken"
        return Pair(image, [self.caption, "short", "half \ud83d"], f"<key> {index}", "<b>")

    def notes(self) -> list[str]:
        return ["not used: 3 files .heic\x1b[2J"]

    def fingerprint(self) -> str:
        return "mixed"


@pytest.fixture(scope="module")
def facts():
    return inspection.inspect_source(Mixed(), 1_000)


def test_the_facts_describe_the_source(facts):
    assert (facts.records, facts.looked_at, facts.labels) == (300, 300, 1)
    assert facts.bad == {"damaged_record": 50, "undecodable": 50}
    assert facts.formats == {"PNG": 100, "JPEG": 100}
    assert (facts.short_sides.min(), facts.short_sides.max()) == (12, 309)
    assert set(facts.long_sides) == {400}
    assert set(facts.captions) == {3}
    assert set(facts.characters) == {len(Mixed.caption), 5, 6}
    assert sorted(set(facts.tokens))[:2] == [3, 4]
    lines = inspection.format_facts(facts)
    assert lines[0] == "300 records; all of them were read"
    assert lines[1].split(maxsplit=1) == ["bad", "33.33%: damaged_record 50, undecodable 50"]
    assert "formats           PNG 50.0%, JPEG 50.0%" in lines
    assert "long side, px             400        400        400        400        400" in lines
    assert lines.index("samples") == len(lines) - 11
    assert not any(character in line for line in lines for character in "\x1b\ud83d")


def test_token_counts_include_both_markers_and_exclamation_marks():
    assert inspection._token_counts(["a cat", "a cat!", "!" * 9 + "a", "cat " * 300]) == [4, 5, 4, 302]


def test_long_captions_count_as_truncated():
    class Long(Mixed):
        def __getitem__(self, index):
            return super().__getitem__(index - index % 6 + 2)._replace(captions=["cat " * 75, "cat " * 76])

    lines = inspection.format_facts(inspection.inspect_source(Long(), 20))
    assert "truncated at 77   50.00% of the captions" in lines


def test_a_large_source_is_sampled():
    one, same = (inspection.inspect_source(Mixed(), 60) for _ in range(2))
    assert inspection.format_facts(one) == inspection.format_facts(same)
    assert inspection.format_facts(one)[0] == "300 records; 60 of them, drawn with seed 0, were read"
    assert sum(one.bad.values()) + len(one.image_bytes) == 60


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_sheet_is_one_page_with_escaped_captions(facts):
    text = inspection.contact_sheet("<title> & more", facts)
    text.encode("utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert tags == {
        "html",
        "meta",
        "title",
        "style",
        "h1",
        "pre",
        "main",
        "figure",
        "img",
        "figcaption",
        "ul",
        "li",
        "p",
    }
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert 60 < len(images) == len(facts.samples) < 120  # two of three are not bad
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in images)
    assert all(max(int(image["width"]), int(image["height"])) <= 256 for image in images)
    assert images[0]["alt"] == Mixed.caption
    assert page.texts.count(Mixed.caption) == len(images)
    assert "<title> & more" in page.texts
    assert any("<key> " in line for line in page.texts)
    assert "http://" not in text and "https://" not in text


def test_a_source_of_only_bad_pairs_has_facts_and_a_sheet():
    class Bad(Mixed):
        def __getitem__(self, index):
            return super().__getitem__(0)

    facts = inspection.inspect_source(Bad(), 10)
    assert inspection.format_facts(facts)[1].split(maxsplit=1) == ["bad", "100.00%: damaged_record 10"]
    assert Page(inspection.contact_sheet("bad", facts)).texts


def test_an_empty_source_is_refused():
    class Empty(Mixed):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="the source has no pairs"):
        inspection.inspect_source(Empty(), 10)


def test_inspect_prints_the_facts_and_writes_the_sheet(tmp_path, capsys):
    sheet = tmp_path / "sheet.html"
    assert prepare.main(["inspect", "emoji:noto/held_out", f"--sheet={sheet}", "--samples=50"]) == 0
    output = capsys.readouterr().out
    assert "205 records; 50 of them, drawn with seed 0, were read" in output
    assert f"50 images and their captions are in {sheet}" in output
    assert sheet.read_text(encoding="utf-8").count("<figure>") == 50


def test_images_are_counted_after_the_warm_up():
    def batches():
        while True:
            time.sleep(0.01)
            yield {"image": np.zeros((8, 2, 2, 3))}

    feed = inspection.measure_feed_speed(batches(), warm_up=0.1, measured=0.5)
    assert 50 < feed.images_per_second <= 800
    assert feed.images_per_cpu_second is None or feed.images_per_cpu_second > feed.images_per_second
    assert feed.cores >= 1


@pytest.mark.parametrize(("pairs_per_second", "hosts"), [(1, 1), (100, 1), (101, 2), (25_000, 250)])
def test_hosts_are_rounded_up(pairs_per_second, hosts):
    assert inspection.Feed(100.0, None, 4).hosts_for(pairs_per_second) == hosts


def test_bench_measures_the_pipeline_of_a_config(capsys, monkeypatch):
    measure = functools.partial(inspection.measure_feed_speed, warm_up=0.0, measured=0.2)
    monkeypatch.setattr(inspection, "measure_feed_speed", measure)
    arguments = ["--config=quickstart", "--config.data.num_workers=0", "--pairs-per-second=1000000"]
    assert prepare.main(["bench", "emoji:noto/held_out", *arguments]) == 0
    rate, *_, hosts = capsys.readouterr().out.splitlines()
    images = int(
        re.match(r"([\d,]+) images/s of 32 x 32 on \d+ cores with 0 workers of 1 threads each", rate)[1].replace(
            ",", ""
        )
    )
    needed = int(re.match(r"1,000,000 pairs/s need ([\d,]+) hosts with \d+ cores each", hosts)[1].replace(",", ""))
    assert needed == pytest.approx(1_000_000 / images, rel=0.01, abs=1)
