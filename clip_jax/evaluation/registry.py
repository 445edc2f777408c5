"""The evaluation tasks by name: the paper's 27 data sets, seven distribution shifts, retrieval, and included data."""

import difflib

from clip_jax.data.sources.array_record import EMOJI_STYLES
from clip_jax.evaluation.task import Task, read_task_file


def _labeled(name: str, title: str, source: str, **more) -> Task:
    """Returns a row whose prompts and published numbers have the name of the task."""
    more = {"prompts": name, "published": name, "groups": ("paper",)} | more
    return Task(name, "zero_shot", source, title, **more)


def _tfds(name: str, title: str, data: str, test: str, train: str = "", validation: str = "", **more) -> Task:
    """Returns a row from TensorFlow Datasets; ``test``, ``train`` and ``validation`` are splits of ``data``."""
    label = more.pop("label", "label")
    splits = [
        f"tfds:{data}/{split}?caption=&label={label}&image=image" if split else "" for split in (train, validation)
    ]
    source = f"tfds:{data}/{test}?caption=&label={label}&image=image"
    more = {"how_to_get": f"tfds build {data} --file_format=array_record"} | more
    return _labeled(name, title, source, train=splits[0], validation=splits[1], **more)


def _folders(name: str, title: str, how_to_get: str, train: str = "train", validation: str = "", **more) -> Task:
    """Returns a row whose images the user must sort into ``{data}/name/split``, one folder for each class."""
    test = more.pop("test", "test")
    test, train, validation = (f"image_folder:{{data}}/{name}/{s}" if s else "" for s in (test, train, validation))
    how_to_get = how_to_get.replace("{here}", f"{{data}}/{name}")
    return _labeled(name, title, test, train=train, validation=validation, how_to_get=how_to_get, **more)


def _left_out(style: str) -> Task:
    """Returns the task for a run that trains on all styles but this one: chooses a recipe without the test style."""
    others = ",".join(other for other in TRAINING_STYLES if other != style)
    return Task(
        f"emoji_left_out_{style}",
        "zero_shot",
        f"emoji:{style}/train",
        f"Emoji of concepts trained on, in the style {style}, which the run must not have trained on",
        prompts="emoji",
        pixel_baseline=f"emoji:{others}/train",
        groups=("emoji_left_out",),
    )


TRAINING_STYLES = tuple(style for style in EMOJI_STYLES if style != "openmoji")  # as in configs/quickstart.py
TRAINING_EMOJI = f"emoji:{','.join(TRAINING_STYLES)}"
PAPER, VTAB, SHIFT, RETRIEVAL = ("paper",), ("paper", "vtab"), ("shift",), ("retrieval",)
MEAN = "mean_per_class"
BY_HAND = "~/tensorflow_datasets/downloads/manual"
IMAGENET = (
    f"request academic access at image-net.org; put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in "
    f"{BY_HAND}, then run tfds build imagenet2012 --file_format=array_record"
)
VIDEO_SHIFTS = (
    "https://do-imagenet-classifiers-generalize-across-time.s3-us-west-2.amazonaws.com/imagenet_vid_ytbb_robust.tar.gz"
    "; put its anchor frames (pm0) in {here}/test, a folder per class"
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
        "https://huggingface.co/datasets/sasha/birdsnap; put the images listed in the authors' test_images.txt in "
        "{here}/test and the others in {here}/train, in the data set's own folders",
    ),
    # The first of the authors' ten partitions; the default of TensorFlow Datasets is another.
    _tfds("sun397", "SUN397", "sun397/standard-part1-120k", "test", "train", groups=VTAB),
    _folders(
        "stanford_cars",
        "Stanford Cars",
        "put https://www.kaggle.com/datasets/cyizhuo/stanford-cars-by-classes-folder (the authors' server no longer "
        "has it) in {here}/train and {here}/test, a folder per class, with - for each / in a name",
    ),
    _folders(
        "fgvc_aircraft",
        "FGVC Aircraft",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz; put its variants in "
        "{here}/train, {here}/val and {here}/test, a folder per class, with - for each / in a name",
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
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge; put "
        "Training in {here}/train, PublicTest in {here}/val and PrivateTest in {here}/test, in folders 0 to 6 "
        "by emotion",
        validation="val",
    ),
    _tfds("stl10", "STL-10", "stl10", "test", "train"),
    # The images that the paper drew from these two are not known. The data is shuffled: these are as many of it.
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
        "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/; put its training folders in "
        "{here}/train, and Final_Test in {here}/test, in folders 00000 to 00042 by the class in its table",
    ),
    _folders(
        "kitti_distance",
        "KITTI Distance",
        "https://www.cvlibs.net/datasets/kitti; put its 2D object data in {here}/train and {here}/test, in folders 0 "
        "to 3 by the distance of the closest vehicle: under 8 m, under 20 m, farther, no vehicle (VTAB's task)",
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
        "https://www.crcv.ucf.edu/data/UCF101.php; put the middle frame of each video of its first split in "
        "{here}/train and {here}/test, in the data set's own folders",
    ),
    _folders(
        "kinetics700",
        "Kinetics-700",
        "torchvision.datasets.Kinetics(root, num_classes='700', split='val', download=True) gets the 2020 version; put "
        "the middle frame of each video in {here}/val (training videos: {here}/train), a folder per class",
        test="val",
        metric="mean_top_1_top_5",
    ),
    _folders(
        "clevr_counts",
        "CLEVR Counts",
        "CLEVR v1.0, https://cs.stanford.edu/people/jcjohns/clevr; put its training images in {here}/train and its "
        "validation images in {here}/test, in folders 3 to 10 by the number of objects in the scene (VTAB's task)",
        groups=VTAB,
    ),
    _labeled(
        "hateful_memes",
        "Hateful Memes",
        "jsonl:{data}/hateful_memes/dev.jsonl?image=img&caption=&label=label",
        train="jsonl:{data}/hateful_memes/train.jsonl?image=img&caption=&label=label",
        metric="roc_auc",
        how_to_get="accept its license with Meta AI and unpack it to {data}/hateful_memes",
    ),
    _folders(
        "rendered_sst2",
        "Rendered SST2",
        "https://openaipublic.azureedge.net/clip/data/rendered-sst2.tgz; rename its folder to {here}",
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
        how_to_get="https://objectnet.dev/downloads/objectnet-1.0.zip, unpacked to {data}; of its 313 folders, the 113 "
        "with ImageNet's classes are used",
    ),
    _folders("imagenet_vid", "ImageNet-Vid", VIDEO_SHIFTS + ", named by WordNet id", train="", groups=SHIFT),
    _folders("youtube_bb", "YouTube-BB", VIDEO_SHIFTS + ", named by class name", train="", groups=SHIFT),
    Task(
        "flickr30k",
        "retrieval",
        "karpathy:{data}/flickr30k/dataset_flickr30k.json?split=test",
        "Flickr30k",
        groups=RETRIEVAL,
        published="flickr30k",
        how_to_get="request the images at https://shannon.cs.illinois.edu/DenotationGraph; put them and, from "
        "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip, dataset_flickr30k.json in "
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
        note="the nearest mean image is given images of the held-out concepts; the model is not",
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
    """Returns the tasks that ``names`` stands for.

    Args:
      names: separated by commas: tasks, groups, ``all``, or JSON files (see :func:`read_task_file`).

    Raises:
      ValueError: a task or group does not exist, or a file is not valid; one line.
      FileNotFoundError: a file does not exist.
    """
    found: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        tasks = read_task_file(name) if name.endswith(".json") else [task for task in TASKS if _matches(name, task)]
        if not tasks:
            known = [task.name for task in TASKS] + sorted({group for task in TASKS for group in task.groups}) + [ALL]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"there is no task or group {name!r}; did you mean {near!r}? --list shows all")
        for task in tasks:
            if found.setdefault(task.name, task) != task:
                raise ValueError(f"two tasks have the name {task.name}; rename one")
    if not found:
        raise ValueError("no task is given; --list shows all")
    return list(found.values())


def _matches(name: str, task: Task) -> bool:
    return name in (ALL, task.name, *task.groups)
