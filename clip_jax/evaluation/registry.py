"""The evaluation tasks that are known by name: the paper's 27 data sets, its seven shifts, retrieval, what ships."""

import dataclasses
import difflib
import json
import pathlib
import re

from clip_jax.data.sources.array_record import EMOJI_STYLES

KINDS = ("zero_shot", "retrieval")
METRICS = {
    "zero_shot": ("top_1", "top_5", "mean_per_class", "mean_top_1_top_5", "average_precision_11", "roc_auc"),
    "retrieval": ("image_to_text_recall@1", "text_to_image_recall@1"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One row of the registry, and what a task file in JSON holds.

    Attributes:
      name: as ``--tasks`` takes it.
      kind: one of ``KINDS``.
      source: the pictures, as :mod:`clip_jax.data.sources` names them; ``{data}`` stands for ``--data``.
      title: for people.
      metric: the one that the task is known by, of ``METRICS[kind]``, whose first it is if it isn't said; in a paper's
        task, the paper's.
      prompts: a file of ``prompts/``, without ``.json``, with class names and templates.
      class_names: instead of those of ``prompts``.
      labels: what the sources call the classes, in the same order; empty where that is their number or name
        (:mod:`clip_jax.evaluation.labels` has the rule).
      templates: instead of those of ``prompts``.
      train, validation: sources for the linear probe; without a validation split a part of ``train`` is taken. Images
        of classes that are not the task's are left out and counted, and so for ``pixel_baseline``.
      other_classes: whether images of ``source`` of other classes are left out and counted, instead of refused.
      first_caption: of retrieval, whether a picture's text is its first caption alone, which several may share; else
        all are texts, each with one right picture.
      pixel_baseline: a labelled source for the nearest mean picture; empty: none.
      note: a sentence that the result has with it.
      groups: other names in ``--tasks`` that mean this one too.
      published: the row of ``published.json`` with other models' numbers on the same task.
      how_to_get: a line for who does not have the data.
    """

    name: str
    kind: str
    source: str
    title: str = ""
    metric: str = ""
    prompts: str = ""
    class_names: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    train: str = ""
    validation: str = ""
    other_classes: bool = False
    first_caption: bool = False
    pixel_baseline: str = ""
    note: str = ""
    groups: tuple[str, ...] = ()
    published: str = ""
    how_to_get: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError if a value is not one of those that there are."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", self.name, re.ASCII):
            raise ValueError(f"a task's name is letters, digits, _, - and . only, not {self.name[:40]!r}")
        if self.kind not in KINDS:
            raise ValueError(f"task {self.name}: kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if not self.metric:
            object.__setattr__(self, "metric", METRICS[self.kind][0])
        if self.metric not in METRICS[self.kind]:
            raise ValueError(f"task {self.name}: metric={self.metric!r} must be one of {', '.join(METRICS[self.kind])}")
        if self.labels and self.class_names and len(self.labels) != len(self.class_names):
            raise ValueError(f"task {self.name}: {len(self.class_names)} class_names for {len(self.labels)} labels")
        unused = [key for key in self._unused_keys() if getattr(self, key)]
        if unused:
            without = "" if self.train or unused[0] != "validation" else " without train"
            raise ValueError(
                f"task {self.name}: {unused[0]} has no effect with kind={self.kind!r} and metric={self.metric!r}"
                f"{without}; leave it out"
            )

    def _unused_keys(self) -> tuple[str, ...]:
        """The attributes that would change nothing, so that setting one is a mistake."""
        if self.kind == "retrieval":
            names = ("prompts", "class_names", "labels", "templates", "other_classes", "note")
            return (*names, "train", "validation", "pixel_baseline")
        unused = ("first_caption",) + (() if self.train else ("validation",))
        return unused + (("pixel_baseline",) if self.metric == "average_precision_11" else ())


def _labelled(name: str, title: str, source: str, **more) -> Task:
    """A row whose prompts and published numbers go by its own name."""
    more = {"prompts": name, "published": name, "groups": ("paper",)} | more
    return Task(name, "zero_shot", source, title, **more)


def _tfds(name: str, title: str, data: str, test: str, train: str = "", validation: str = "", **more) -> Task:
    """A row from TensorFlow Datasets; ``test``, ``train`` and ``validation`` are splits of ``data``."""
    label = more.pop("label", "label")
    splits = [
        f"tfds:{data}/{split}?caption=&label={label}&image=image" if split else "" for split in (train, validation)
    ]
    source = f"tfds:{data}/{test}?caption=&label={label}&image=image"
    more = {"how_to_get": f"tfds build {data} --file_format=array_record"} | more
    return _labelled(name, title, source, train=splits[0], validation=splits[1], **more)


def _folders(name: str, title: str, how_to_get: str, train: str = "train", validation: str = "", **more) -> Task:
    """A row of pictures that somebody has to sort into ``{data}/name/split``, a folder per class."""
    test = more.pop("test", "test")
    test, train, validation = (f"image_folder:{{data}}/{name}/{s}" if s else "" for s in (test, train, validation))
    how_to_get = how_to_get.replace("{here}", f"{{data}}/{name}")
    return _labelled(name, title, test, train=train, validation=validation, how_to_get=how_to_get, **more)


def _left_out(style: str) -> Task:
    """A style of emoji for a run that trains on the others: how a recipe is chosen without the style of the test."""
    others = ",".join(other for other in TRAINING_STYLES if other != style)
    return Task(
        f"emoji_left_out_{style}",
        "zero_shot",
        f"emoji:{style}/train",
        f"Emoji of concepts trained on, in the style {style}, which the run must have left out",
        prompts="emoji",
        pixel_baseline=f"emoji:{others}/train",
        groups=("emoji_left_out",),
    )


TRAINING_STYLES = tuple(style for style in EMOJI_STYLES if style != "openmoji")  # those of configs/quickstart.py
TRAINING_EMOJI = f"emoji:{','.join(TRAINING_STYLES)}"
PAPER, VTAB, SHIFT, RETRIEVAL = ("paper",), ("paper", "vtab"), ("shift",), ("retrieval",)
MEAN = "mean_per_class"
BY_HAND = "~/tensorflow_datasets/downloads/manual"
IMAGENET = (
    f"academic access must be asked for at image-net.org; ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar to "
    f"{BY_HAND}, then tfds build imagenet2012 --file_format=array_record"
)
VIDEO_SHIFTS = (
    "https://do-imagenet-classifiers-generalize-across-time.s3-us-west-2.amazonaws.com/imagenet_vid_ytbb_robust.tar.gz"
    "; its anchor frames (pm0) to {here}/test, a folder per class"
)
CLIP_ART = "array_record:{data}/openclipart/pairs-*"
GET_CLIP_ART = "python -m clip_jax.prepare openclipart (docs/data.md)"

TASKS: tuple[Task, ...] = (
    _tfds("food101", "Food-101", "food101", "validation", "train"),
    _tfds("cifar10", "CIFAR-10", "cifar10", "test", "train"),
    _tfds("cifar100", "CIFAR-100", "cifar100", "test", "train", groups=VTAB),
    _folders(
        "birdsnap",
        "Birdsnap",
        "pictures and lists: https://huggingface.co/datasets/sasha/birdsnap; those of the authors' test_images.txt to "
        "{here}/test, the others to {here}/train, in the data set's own folders",
    ),
    # The first of the ten partitions that its authors give; TensorFlow Datasets' own is another.
    _tfds("sun397", "SUN397", "sun397/standard-part1-120k", "test", "train", groups=VTAB),
    _folders(
        "stanford_cars",
        "Stanford Cars",
        "the authors' server no longer has it; https://www.kaggle.com/datasets/cyizhuo/stanford-cars-by-classes-folder "
        "to {here}/train and {here}/test, a folder per class, a - for each / in a name",
    ),
    _folders(
        "fgvc_aircraft",
        "FGVC Aircraft",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz, its variants to "
        "{here}/train, {here}/val and {here}/test, a folder per class, a - for each / in a name",
        validation="val",
        metric=MEAN,
    ),
    _tfds(
        "voc2007",
        "PASCAL VOC 2007",
        "voc/2007",
        "test",
        "train",
        "validation",
        label="labels",
        metric="average_precision_11",
    ),
    _tfds("dtd", "Describable Textures", "dtd", "test", "train", "validation", groups=VTAB),
    _tfds("oxford_pets", "Oxford-IIIT Pets", "oxford_iiit_pet", "test", "train", metric=MEAN, groups=VTAB),
    _tfds("caltech101", "Caltech-101", "caltech101", "test", "train", metric=MEAN, groups=VTAB),
    _tfds(
        "flowers102",
        "Oxford Flowers 102",
        "oxford_flowers102",
        "test",
        "train",
        "validation",
        metric=MEAN,
        groups=VTAB,
    ),
    _tfds("mnist", "MNIST", "mnist", "test", "train"),
    _folders(
        "fer2013",
        "Facial Emotion Recognition 2013",
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge; its "
        "Training to {here}/train, PublicTest to {here}/val, PrivateTest to {here}/test, in folders 0 to 6 "
        "by the emotion",
        validation="val",
    ),
    _tfds("stl10", "STL-10", "stl10", "test", "train"),
    # The pictures that the paper drew from these two are not known: as many as it took, of data that comes shuffled.
    _tfds("eurosat", "EuroSAT", "eurosat/rgb", "train[:5000]", "train[5000:15000]", groups=VTAB),
    _tfds(
        "resisc45",
        "RESISC45",
        "resisc45",
        "train[:25200]",
        "train[25200:28350]",
        groups=VTAB,
        how_to_get=f"https://1drv.ms/u/s!AmgKYzARBl5ca3HNaHIlzp_IXjs, unpacked to {BY_HAND}/NWPU-RESISC45, then "
        "tfds build resisc45 --file_format=array_record",
    ),
    _folders(
        "gtsrb",
        "GTSRB",
        "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/; its training pictures as they are to "
        "{here}/train, those of Final_Test to {here}/test, in folders 00000 to 00042 by the class in its table",
    ),
    _folders(
        "kitti_distance",
        "KITTI Distance",
        "KITTI's 2D object data, https://www.cvlibs.net/datasets/kitti, to {here}/train and {here}/test, in folders 0 "
        "to 3 by how far the closest vehicle is: under 8 m, under 20 m, farther, none (VTAB's task)",
        groups=VTAB,
    ),
    _folders(
        "country211",
        "Country211",
        "https://openaipublic.azureedge.net/clip/data/country211.tgz, unpacked to {data}",
        validation="valid",
    ),
    _tfds("pcam", "PatchCamelyon", "patch_camelyon", "test", "train", "validation", groups=VTAB),
    _folders(
        "ucf101",
        "UCF101",
        "https://www.crcv.ucf.edu/data/UCF101.php; the middle frame of each video of its first split to {here}/train "
        "and {here}/test, in the data set's own folders",
    ),
    _folders(
        "kinetics700",
        "Kinetics-700",
        "torchvision.datasets.Kinetics(root, num_classes='700', split='val', download=True) gives that of 2020; the "
        "middle frame of each video to {here}/val, of the training videos to {here}/train, a folder per class",
        test="val",
        metric="mean_top_1_top_5",
    ),
    _folders(
        "clevr_counts",
        "CLEVR Counts",
        "CLEVR v1.0, https://cs.stanford.edu/people/jcjohns/clevr; its training pictures to {here}/train, its "
        "validation pictures to {here}/test, in folders 3 to 10 by the number of objects in the scene (VTAB's task)",
        groups=VTAB,
    ),
    _labelled(
        "hateful_memes",
        "Hateful Memes",
        "jsonl:{data}/hateful_memes/dev.jsonl?image=img&caption=&label=label",
        train="jsonl:{data}/hateful_memes/train.jsonl?image=img&caption=&label=label",
        metric="roc_auc",
        how_to_get="its licence must be accepted with Meta AI; unpack it to {data}/hateful_memes",
    ),
    _folders(
        "rendered_sst2",
        "Rendered SST2",
        "https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz, its folder as {here}",
        validation="valid",
    ),
    _tfds(
        "imagenet",
        "ImageNet",
        "imagenet2012",
        "validation",
        "train",
        groups=PAPER + SHIFT,
        how_to_get=IMAGENET,
    ),
    _tfds("imagenet_v2", "ImageNet-V2", "imagenet_v2/matched-frequency", "test", prompts="imagenet", groups=SHIFT),
    _tfds("imagenet_r", "ImageNet-R", "imagenet_r", "test", groups=SHIFT),
    _tfds("imagenet_a", "ImageNet-A", "imagenet_a", "test", groups=SHIFT),
    _tfds("imagenet_sketch", "ImageNet-Sketch", "imagenet_sketch", "test", prompts="imagenet", groups=SHIFT),
    Task(
        "objectnet",
        "zero_shot",
        "image_folder:{data}/objectnet-1.0/images",
        "ObjectNet",
        prompts="objectnet",
        other_classes=True,
        groups=SHIFT,
        published="objectnet",
        how_to_get="https://objectnet.dev/downloads/objectnet-1.0.zip, unpacked to {data}; of its 313 folders the 113 "
        "of ImageNet's classes count",
    ),
    _folders("imagenet_vid", "ImageNet-Vid", VIDEO_SHIFTS + ", by its WordNet id", train="", groups=SHIFT),
    _folders("youtube_bb", "YouTube-BB", VIDEO_SHIFTS + ", by its name", train="", groups=SHIFT),
    Task(
        "flickr30k",
        "retrieval",
        "karpathy:{data}/flickr30k/dataset_flickr30k.json?split=test",
        "Flickr30k",
        groups=RETRIEVAL,
        published="flickr30k",
        how_to_get="the pictures must be asked for at https://shannon.cs.illinois.edu/DenotationGraph; they and, of "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, dataset_flickr30k.json to "
        "{data}/flickr30k",
    ),
    Task(
        "coco_retrieval",
        "retrieval",
        "tfds:coco_captions/test",
        "COCO, Karpathy's test split",
        groups=RETRIEVAL,
        published="coco_retrieval",
        how_to_get="tfds build coco_captions --file_format=array_record",
    ),
    Task(
        "emoji_unseen_style",
        "zero_shot",
        "emoji:openmoji/all",
        "Emoji in a style never trained on",
        prompts="emoji",
        pixel_baseline=f"{TRAINING_EMOJI}/all",
        note="the nearest mean picture is given images of the held-out concepts; the model is not",
        groups=("ships",),
    ),
    Task(
        "emoji_unseen_style_trained",
        "zero_shot",
        "emoji:openmoji/train",
        "Emoji of concepts trained on, in a style never trained on",
        prompts="emoji",
        pixel_baseline=f"{TRAINING_EMOJI}/train",
        groups=("ships",),
    ),
    *map(_left_out, TRAINING_STYLES),
    Task(
        "emoji_unseen_concepts",
        "retrieval",
        "emoji:noto,twemoji/held_out",
        "Emoji of concepts never trained on",
        first_caption=True,
        groups=("ships",),
    ),
    Task(
        "emoji_unseen_both",
        "retrieval",
        "emoji:openmoji/held_out",
        "Emoji of concepts and in a style never trained on",
        first_caption=True,
        groups=("ships",),
    ),
    Task(
        "emoji_groups",
        "zero_shot",
        "emoji:openmoji/all?label=group",
        "What an emoji is about, in a style never trained on",
        prompts="emoji_groups",
        groups=("ships",),
    ),
    Task(
        "digits",
        "zero_shot",
        "digits:test",
        "Handwritten digits",
        prompts="digits",
        train="digits:train",
        groups=("ships",),
    ),
    Task(
        "open_clipart_retrieval",
        "retrieval",
        CLIP_ART,
        "Open Clip Art",
        groups=("open_clipart",),
        how_to_get=GET_CLIP_ART,
    ),
    Task(
        "open_clipart_categories",
        "zero_shot",
        f"{CLIP_ART}?label=label",
        "Categories of Open Clip Art",
        metric=MEAN,
        prompts="open_clipart",
        groups=("open_clipart",),
        how_to_get=GET_CLIP_ART,
    ),
)
ALL = "all"


def find_tasks(names: str) -> list[Task]:
    """The tasks that ``names`` means, separated by commas: tasks, groups, ``all``, or files of tasks in JSON.

    A file holds one task or a list of them, each an object of :class:`Task`'s attributes.

    Raises:
      ValueError: there is no such task or group, or a file is not as it should be; one line.
      FileNotFoundError: there is no such file.
    """
    found: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        tasks = _read_file(name) if name.endswith(".json") else [task for task in TASKS if _means(name, task)]
        if not tasks:
            known = [task.name for task in TASKS] + sorted({group for task in TASKS for group in task.groups}) + [ALL]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"there is no task or group {name!r}; did you mean {near!r}? --list shows all")
        for task in tasks:
            if found.setdefault(task.name, task) != task:
                raise ValueError(f"two tasks are called {task.name}")
    if not found:
        raise ValueError("no task is named; --list shows all")
    return list(found.values())


def _means(name: str, task: Task) -> bool:
    return name in (ALL, task.name, *task.groups)


def _read_file(name: str) -> list[Task]:
    try:
        content = json.loads(pathlib.Path(name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    if content == []:
        raise ValueError(f"{name} holds no task; write an object, or a list of them")
    try:
        return [_from_json(entry) for entry in (content if isinstance(content, list) else [content])]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _from_json(entry: object) -> Task:
    if not isinstance(entry, dict):
        raise ValueError(f"a task must be an object, not {type(entry).__name__}")
    defaults = {field.name: field.default for field in dataclasses.fields(Task)}
    for key, value in entry.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)[0]
            raise ValueError(f"a task has no {key!r}; did you mean {near!r}?")
        if isinstance(defaults[key], tuple):
            right, kind = isinstance(value, list) and all(isinstance(item, str) for item in value), "a list of texts"
        elif isinstance(defaults[key], bool):
            right, kind = isinstance(value, bool), "true or false"
        else:
            right, kind = isinstance(value, str), "a text"
        if not right:
            raise ValueError(f"{key} must be {kind}, not {json.dumps(value, ensure_ascii=False)[:80]}")
    missing = [key for key in ("name", "kind", "source") if not entry.get(key)]
    if missing:
        raise ValueError(f"a task needs {', '.join(missing)}")
    return Task(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
