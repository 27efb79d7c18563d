"""Pictures that the model makes itself, from a prompt and a seed, with the latent as it was made."""

import re
from pathlib import Path

from ..datasets.conditioning import TEXT
from ..datasets.encoders import encode_texts
from ..datasets.training_sets import check_pixels
from ..models.customization import check_texts, check_words
from ..models.generation import check_steps, make_pictures, save_picture
from ..models.pipelines import Model
from ..noise import SCHEME, known_answer
from ..storage.artifacts import whole_file, write_array
from ..storage.hashes import digest
from ..storage.records import keep_complete, record_path, write_record
from .questions import Question


def picture_stem(prompt: str, seed: int, key: str) -> str:
    """A name that tells people which picture it is, and others apart."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words or 'picture'}-seed{seed}-{key[:6]}"


def make_picture(
    model: Model,
    root: Path,
    dataset: str,
    resolution: int,
    prompt: str,
    seed: int,
    steps: int,
    guidance: float,
) -> Question:
    """The picture that a model makes of a prompt and a seed, by deterministic DDIM steps, below
    `root`/synth/made with the arrays of its latent and its prompt's embedding; one that is there is
    kept. Raises UserError where the model cannot make it."""
    check_words(None, {}, model.word_reader, {"--prompt": prompt})
    check_texts(model.reader[0], model.word_reader, {"--prompt": prompt})
    check_steps(model, steps)
    identity = {
        **model.identity,
        "prompts": digest([prompt]),
        "first_seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "resolution": resolution,
        "dataset": dataset,
        "noise": SCHEME,
        "known_answer": known_answer(),
    }
    stem = picture_stem(prompt, seed, digest(identity))
    names = [f"synth/made/{stem}{end}" for end in (".png", "-latents.npy", "-embeddings.npy")]
    picture, latents, embeddings = (root / name for name in names)
    question = Question(picture, prompt, seed, steps, guidance, names[1], names[2])
    is_kept = keep_complete(latents, identity, True, "")
    if is_kept and picture.exists() and embeddings.exists():
        return question
    texts = {
        name: tensor.numpy()
        for name, tensor in encode_texts(model, [prompt], [None], resolution).items()
    }
    check_pixels("embedding of --prompt", texts[TEXT])
    shape = model.latent_shape(resolution)
    latent, [pixels] = make_pictures(
        model, dataset, texts, [seed], shape, steps, guidance, batch_size=1
    )
    record_path(latents).unlink(missing_ok=True)
    with whole_file(picture) as file:
        save_picture(file, pixels)
    write_array(embeddings, texts[TEXT])
    write_record(latents, identity, model.device, write_array(latents, latent))
    return question
