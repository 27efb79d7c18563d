"""What a run has to do, and what of it an earlier one with the same model has left."""

from contextlib import suppress
from pathlib import Path

from ..attribution.estimation import choose_num_samples
from ..attribution.names import REMOVAL
from ..attribution.removal import RemovalSettings
from ..attribution.removal_index import LISTING
from ..attribution.settings import UnlearnSettings
from ..datasets.entries import Found
from ..datasets.settings import PUBLISHED
from ..datasets.tasks import BASE
from ..datasets.text_files import Captions
from ..errors import NotThere
from ..models.pipelines import Model
from ..storage.hashes import hash_tensors, named_weights
from ..storage.reading import read_array
from ..storage.records import is_complete, read_record
from . import costs
from .questions import Question, find_known

REMEDY = "remove it, or give another --out"


def count_work(
    found: Found,
    model: Model,
    out: Path,
    questions: list[Question],
    sampling: int | None,
    removal: RemovalSettings | None,
    scoring: str,
) -> costs.Counts:
    """What a run has to do. sampling: the passes of the picture that is to be made, None where none
    is; removal: None where pictures are unlearned; scoring: the way."""
    num_images = len(found.entries)
    fewest = min(len(entry.captions) for entry in found.entries)
    captions = [entry.captions[:fewest] for entry in found.entries]
    texts = Captions(model, out / "root", captions)
    answered = sum(is_answered(out, model, question, scoring) for question in questions)
    return costs.Counts(
        num_images,
        num_images * fewest,
        PUBLISHED["time_samples"],
        choose_num_samples(out / "root", num_images),
        UnlearnSettings().draws_a_step,
        len(questions) + (sampling is not None) - answered,
        sampling or 0,
        len(removal.timesteps) if removal else 0,
        removal.probes if removal else 0,
        texts.num_encoded,
        sum(texts.num_bytes().values()),
    )


def read_part(path: Path, part: str) -> dict:
    """A part of an artefact's record, {} where the artefact is not whole, as while another process
    makes it anew."""
    try:
        found = read_record(path, REMEDY).get(part)
    except NotThere:
        return {}
    return found if isinstance(found, dict) else {}


def is_answered(out: Path, model: Model, question: Question, scoring: str) -> bool:
    """Whether a question has a result of a model in OUT, by a way of scoring."""
    entry = find_known(out / "tasks.json", question)
    name = entry["synth_image_path"].removeprefix("synth/") if entry else ""
    folder = out / "results/influence" / name
    result = read_part(folder / "influence.npz", "identity") if name else {}
    settings = result.get("settings")
    if not isinstance(settings, dict) or settings.get("scoring") != scoring:
        return False
    if scoring == REMOVAL:
        return result.get("weights") == model.weights_hash
    change = read_part(folder / "weight_change.safetensors", "identity") if name else {}
    return change.get("weights") == model.weights_hash and is_complete(folder / "influence.npz")


def list_done(out: Path, model: Model, num_images: int) -> set[str]:
    """Names of the steps whose files stand in OUT, of a model and so many images."""
    root, done = out / "root", set()
    latents, fisher = root / "laion_latents.npy", root / "sd_fisher.safetensors"
    losses = out / "results/orig_loss" / BASE / "laion_loss.npy"
    features = out / "results/removal" / BASE / "laion" / LISTING
    encoders = {
        part: hash_tensors(named_weights(getattr(model.pipeline, part)))
        for part in ("vae", "text_encoder")
    }
    is_own = encoders.items() <= read_part(latents, "identity").items()
    with suppress(NotThere):
        if is_own and len(read_array(latents)) == 2 * num_images:
            done.add(costs.ENCODING)
    for path, part, name in (
        (fisher, "circumstances", costs.CURVATURE),
        (losses, "identity", costs.LOSSES),
        (features, "identity", costs.FEATURES),
    ):
        is_own = read_part(path, "identity").get("weights") == model.weights_hash
        if is_own and read_part(path, part).get("num_images") == num_images:
            done.add(name)
    return done
