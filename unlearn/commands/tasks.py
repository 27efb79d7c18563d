"""Writes the task file of the papers' queries: 400 on the AbC benchmark, 110 on MSCOCO.

    python -m unlearn tasks
    python -m unlearn tasks --dataroot /scratch/abc --output tasks/all_tasks.json
    python -m unlearn tasks --dataroot data/mscoco

From `json/test_*.json` and `path_to_prompts.json` of the data root, as `data/download_abc.sh`
leaves it, or from `sample_caption.txt` and `sample/`, as `data/download_mscoco.sh` does. Other data
roots bring their own task files.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..datasets.annotations import read_lines
from ..datasets.tasks import strip_dataset
from ..errors import UserError
from ..storage.artifacts import write_json
from ..storage.reading import MOST_TEXT, read_array, read_json, resolve_inside
from .flags import make_parser

# The models of the paper's queries: entries of json/TEST_CASE.json.
CHOSEN_ENTRIES = {
    "test_artchive": (0, 1, 2, 3, 4),
    "test_bamfg": (0, 1, 2, 3, 4),
    "test_unobserved_imagenet": (0, 20, 70, 180, 210),
    "test_observed_imagenet": (11, 12, 17, 18, 19),
}
TRAIN_PROMPTS = {
    "test_artchive": "A picture in the style of <new1> art",
    "test_bamfg": "A picture in the style of <new1> art",
    "test_unobserved_imagenet": "<new1> {category}",
    "test_observed_imagenet": "<new1> {category}",
}
# MSCOCO: a caption a line, the picture made from it, and the rows of its latent and embedding.
SAMPLE_CAPTIONS = "sample_caption.txt"
SAMPLE_ARRAYS = {
    "latents": "coco17_sample_latents.npy",
    "embeddings": "coco17_sample_text_embeddings.npy",
}
NUM_SETS = 2
NUM_IMAGES_PER_SET = 40
IMAGE_STRIDE = 4


def read_entry(dataroot: Path, test_case: str, index: int) -> dict:
    """The entry of one customized model, checked. Raises UserError where it is missing or
    malformed."""
    path = dataroot / "json" / f"{test_case}.json"
    entries = read_json(path, most=MOST_TEXT)
    if not isinstance(entries, list) or not index < len(entries):
        found = f"a list of {len(entries)}" if isinstance(entries, list) else type(entries).__name__
        raise UserError(f"{path}: expected a list with an entry {index}, found {found}")
    entry, item = entries[index], f"{path}: entry {index}"
    if not isinstance(entry, dict) or not isinstance(entry.get("category"), (str, type(None))):
        raise UserError(
            f"{item}: expected an object with a string `category`, found {shorten(entry)}"
        )
    if entry.get("category") is None and "{category}" in TRAIN_PROMPTS[test_case]:
        raise UserError(f"{item}: `category` is needed for the train prompt, found none")
    sets = entry.get("synth")
    if not isinstance(sets, dict) or len(sets) != NUM_SETS:
        raise UserError(
            f"{item}: expected `synth` with {NUM_SETS} sets of images, found {shorten(sets)}"
        )
    for name, paths in sets.items():
        if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
            raise UserError(
                f"{item}: expected `synth.{name}` to be a list of paths, found {shorten(paths)}"
            )
        if len(paths) != NUM_IMAGES_PER_SET:
            raise UserError(
                f"{item}: expected {NUM_IMAGES_PER_SET} paths in `synth.{name}`, found {len(paths)}"
            )
    return entry


def shorten(value: object) -> str:
    """A value as text of at most 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_prompts(dataroot: Path) -> dict:
    """path_to_prompts.json as a mapping whose keys are paths of images or folders below the data
    root."""
    path = dataroot / "path_to_prompts.json"
    prompts = read_json(path, most=MOST_TEXT)
    if not isinstance(prompts, dict):
        raise UserError(
            f"{path}: expected a mapping from paths to prompts, found {type(prompts).__name__}"
        )
    return {strip_dataset(key).rstrip("/"): value for key, value in prompts.items()}


def find_prompt(prompts: dict, image_path: str) -> str:
    """The prompt of a synthesized image: an entry of its path, or of its folder or the one above.

    A folder's entry may be a list, indexed by the number that is the image's name. Raises UserError
    where nothing fits.
    """
    image = PurePosixPath(image_path)
    value = next(
        (prompts[str(key)] for key in (image, *image.parents[:2]) if str(key) in prompts), None
    )
    if isinstance(value, list) and image_path in prompts:
        value = value[0] if len(value) == 1 else None
    elif isinstance(value, list):
        index = int(image.stem) if image.stem.isdecimal() else len(value)
        value = value[index] if index < len(value) else None
    if not isinstance(value, str) or not value:
        raise UserError(
            f"path_to_prompts.json: expected a prompt for {image_path} or its folder, found none"
        )
    return value


def find_model(dataroot: Path, image_path: str) -> str:
    """`synth/DOMAIN/SET/MODEL/samples/IMAGE` -> `models/DOMAIN/MODEL`. Raises UserError where that
    is no folder."""
    parts = PurePosixPath(image_path).parts
    if len(parts) < 5 or parts[0] != "synth" or parts[-2] != "samples":
        raise UserError(
            f"{image_path}: expected a path like "
            f"synth/imagenet/gpt/n01440764_0000/samples/00000.png"
        )
    model_path = f"models/{parts[1]}/{parts[-3]}"
    if not resolve_inside(dataroot, model_path, image_path).is_dir():
        raise UserError(
            f"{image_path}: expected its model in {dataroot / model_path}, found no such folder"
        )
    return model_path


def make_task(
    dataroot: Path, prompts: dict, test_case: str, index: int, category: str | None, image_path: str
) -> dict:
    """The task of one synthesized image. Raises UserError where its file, prompt or model is
    missing."""
    if not resolve_inside(dataroot, image_path, f"json/{test_case}.json: entry {index}").is_file():
        raise UserError(
            f"json/{test_case}.json: entry {index}: {dataroot / image_path}: no such file"
        )
    return {
        "synth_image_path": image_path,
        "prompt": find_prompt(prompts, image_path),
        "test_case": test_case,
        "test_case_ind": index,
        "model_path": find_model(dataroot, image_path),
        "train_prompt": TRAIN_PROMPTS[test_case].format(category=category),
        "category": category,
    }


def make_tasks(dataroot: str | Path) -> list[dict]:
    """The 400 tasks: test case by test case, model by model, set by set, every fourth image."""
    dataroot, tasks = Path(dataroot), []
    prompts = read_prompts(dataroot)
    for test_case, indices in CHOSEN_ENTRIES.items():
        for index in indices:
            entry = read_entry(dataroot, test_case, index)
            for paths in entry["synth"].values():
                tasks += [
                    make_task(
                        dataroot,
                        prompts,
                        test_case,
                        index,
                        entry.get("category"),
                        strip_dataset(path),
                    )
                    for path in paths[::IMAGE_STRIDE]
                ]
    return tasks


def make_sample_tasks(dataroot: str | Path) -> list[dict]:
    """One task for each line of sample_caption.txt, whose picture is sample/LINE.png. Raises
    UserError where a picture is missing or the numbers disagree."""
    dataroot = Path(dataroot)
    if not (prompts := read_lines(dataroot / SAMPLE_CAPTIONS)):
        raise UserError(
            f"{dataroot / SAMPLE_CAPTIONS}: expected a caption a line, found an empty file"
        )
    stored = (
        SAMPLE_ARRAYS if all((dataroot / name).exists() for name in SAMPLE_ARRAYS.values()) else {}
    )
    for name in stored.values():
        if (shape := read_array(dataroot / name).shape)[:1] != (len(prompts),):
            raise UserError(
                f"{dataroot / name}: expected {len(prompts)} rows, as {SAMPLE_CAPTIONS} has "
                f"lines, found {list(shape)}"
            )
    tasks = []
    for row, prompt in enumerate(prompts):
        path = f"sample/{row}.png"
        if not prompt.strip():
            raise UserError(f"{dataroot / SAMPLE_CAPTIONS}: line {row + 1} is empty")
        if not resolve_inside(dataroot, path, SAMPLE_CAPTIONS).is_file():
            raise UserError(
                f"{dataroot / path}: no such file, but {SAMPLE_CAPTIONS} has {len(prompts)} lines"
            )
        tasks.append(
            {
                "synth_image_path": path,
                "prompt": prompt.strip(),
                **stored,
                **({"row": row} if stored else {}),
            }
        )
    if (extra := dataroot / f"sample/{len(prompts)}.png").exists():
        raise UserError(f"{extra}: has no caption, {SAMPLE_CAPTIONS} has {len(prompts)} lines")
    return tasks


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the task file."""
    parser = make_parser((__doc__ or "").split("\n")[0], "python -m unlearn tasks")
    parser.add_argument(
        "--dataroot", default="data/abc", help="the AbC benchmark, or MSCOCO (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        help="the file to write (default: tasks/all_tasks.json, of MSCOCO tasks/mscoco.json)",
    )
    args = parser.parse_args(argv)
    is_mscoco = (Path(args.dataroot) / SAMPLE_CAPTIONS).exists()
    args.output = args.output or ("tasks/mscoco.json" if is_mscoco else "tasks/all_tasks.json")
    tasks = make_sample_tasks(args.dataroot) if is_mscoco else make_tasks(args.dataroot)
    write_json(args.output, tasks)
    print(f"{args.output}: {len(tasks)} tasks")
