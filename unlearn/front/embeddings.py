"""A model with new words (textual inversion) as the folder of a whole pipeline, which every command
loads."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..datasets.entries import Found
from ..errors import UserError
from ..models.customization import add_tokens
from ..models.embeddings import Embedding, list_tokens
from ..models.pipelines import load_model
from ..models.weights import INDEX
from ..runtime.programs import say
from ..storage.artifacts import own_part
from ..storage.hashes import digest, hash_tensors
from .assembly import finish_folder
from .customized import drop_parts
from .questions import Question


def merge_embeddings(embeddings: list[Embedding], pipeline: str, unet: str, place: Path) -> Path:
    """The folder of a pipeline that knows new words, made once. pipeline, unet: the model, as
    `load_model` takes it. Raises UserError where a word does not fit it."""
    hashes = [[each.names, hash_tensors(dict(each.tables))] for each in embeddings]
    key = digest(hashes, pipeline, unet)
    target = place / f"{embeddings[0].path.stem}-{key[:8]}"
    if (target / INDEX).is_file():
        return target
    try:
        model = load_model(pipeline, "cpu", unet or None)
    except UserError as error:
        raise UserError(str(error).replace("--sd_version", "--model")) from None
    tokens = list_tokens(model.pipeline, embeddings)
    words = ", ".join(f"{each.token} ({each.count})" for each in embeddings)
    say(f"{pipeline}: learns new words (vectors): {words}; it becomes one folder, {target}")
    for (encoder, tokenizer), own in tokens.items():
        add_tokens(model.pipeline, own, encoder, tokenizer)
    part = own_part(target)
    shutil.rmtree(part, ignore_errors=True)
    model.pipeline.save_pretrained(part, safe_serialization=True)
    drop_parts(part)
    finish_folder(part, target)
    return target


def tell_words(
    embeddings: Sequence[Embedding], found: Found, questions: Sequence[Question]
) -> list[str]:
    """What the page says of new words: that images trained the word and not the model, and which
    words neither a prompt nor a caption has, which is said here too."""
    if not embeddings:
        return []
    texts = [question.prompt for question in questions]
    texts += [caption for entry in found.entries for caption in entry.captions]
    unused = [
        each.token
        for each in embeddings
        if not any(word in text for text in texts for word in each.words)
    ]
    notes = [
        "Scores look at the model's weights. Where the images trained the embedding of a new word "
        "alone, these were not trained: how well scores tell such images has not been measured."
    ]
    if unused:
        notes.append(f"No prompt and no caption has {', '.join(unused)}.")
        say(notes[-1])
    return notes
