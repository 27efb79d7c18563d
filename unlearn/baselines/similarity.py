"""Rankings by plain similarity to the query: cosine of pixels, of VAE latents, of CLIP or DINO
features, of texts; shared words.

All cosines are centred: the mean of the training set's features, over images and views, is taken
off first. What all images share says nothing of one of them, and without this it is most of a
cosine.

An encoder is a function from image paths to features [2, n, size] float32: each image as is, then
mirrored.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging as transformers_logging

from ..datasets.encoders import Encoder, encode_images, transform_image
from ..datasets.pictures import load_image
from ..datasets.tasks import Task
from ..datasets.training_sets import TrainingSet, check_pixels
from ..errors import UserError

BLOCK_IMAGES = 64  # candidates in memory at once; part of no result
LARGEST_PIXELS = 64  # pixels are compared at this resolution at the most
# what is left of features less their mean, relative: less is what float32 makes of nothing
ROUNDING = 1e-5
Encode = Callable[[Sequence[Path]], np.ndarray]  # image files to features [views, n, size]


def pixel_encoder(resolution: int) -> Encode:
    """Encoder to pixels in [-1, 1]: cropped as for the VAE, averaged down to 64 x 64 where they are
    larger."""
    size = min(resolution, LARGEST_PIXELS)

    def encode(paths):
        pixels = torch.stack(
            [
                torch.nn.functional.adaptive_avg_pool2d(
                    transform_image(load_image(path), resolution), size
                )
                for path in paths
            ]
        )
        return torch.stack([pixels, pixels.flip(-1)]).flatten(2).numpy()

    return encode


def latent_encoder(model: Encoder, resolution: int, batch_size: int) -> Encode:
    """Encoder to VAE latents, as the training set's are."""
    return lambda paths: (
        torch.stack(
            [
                encode_images(model, paths, resolution, mirrored, batch_size)
                for mirrored in (False, True)
            ]
        )
        .flatten(2)
        .numpy()
    )


def feature_encoder(name: str, device: torch.device, batch_size: int) -> Encode:
    """Encoder to the image features of a transformers model (folder or hub name, safetensors only):
    `get_image_features` where it has that (CLIP), else the first token of its last hidden state
    (DINO's CLS).

    Raises UserError where the model cannot be loaded, lacks weights, or gives no such features of a
    blank image.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        if missing := [key for key in info["missing_keys"] if "pooler" not in key]:
            raise ValueError(f"has no weight {min(missing)}, {len(missing)} missing in all")
        model.eval().requires_grad_(False).to(device)
        image_features(model, processor, [Image.new("RGB", (64, 64))])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--features {name}: cannot be used as a model of image features ({reason:.200})"
        ) from None

    def encode(paths):
        views = []
        for start in range(0, len(paths), batch_size):
            images = [load_image(path) for path in paths[start : start + batch_size]]
            mirrored = [ImageOps.mirror(image) for image in images]
            views.append(
                np.stack([image_features(model, processor, view) for view in (images, mirrored)])
            )
        return np.concatenate(views, axis=1)

    return encode


@torch.no_grad()
def image_features(model: Any, processor: Any, images: Sequence[Image.Image]) -> np.ndarray:
    """Features [n, size] float32 of RGB images. Raises ValueError where the model gives none of
    that shape."""
    inputs = processor(images=images, return_tensors="pt").to(model.device)
    if hasattr(model, "get_image_features"):
        features = model.get_image_features(**inputs)
        features = getattr(features, "pooler_output", features)
    else:
        hidden = model(**inputs).last_hidden_state
        features = hidden[:, 0] if hidden.ndim == 3 else hidden
    if features.shape[:1] != (len(images),) or features.ndim != 2:
        raise ValueError(f"expected features [{len(images)}, size], found {list(features.shape)}")
    return features.float().cpu().numpy()


def encode_blocks(encode: Encode, paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Features [2, b, size] of image files, block by block."""
    for start in range(0, len(paths), BLOCK_IMAGES):
        yield encode(paths[start : start + BLOCK_IMAGES])


def latent_blocks(training_set: TrainingSet) -> Iterator[np.ndarray]:
    """Latents [2, b, size] of a training set, block by block from the memory map. Raises UserError
    where not finite."""
    for start in range(0, len(training_set), BLOCK_IMAGES):
        latents = np.asarray(training_set.latents[:, start : start + BLOCK_IMAGES], np.float32)
        check_pixels(f"latents from {training_set.ids[start]} on", latents)
        yield latents.reshape(*latents.shape[:2], -1)


def text_blocks(training_set: TrainingSet) -> Iterator[np.ndarray]:
    """Embeddings [captions, b, size] of a training set's captions, block by block. With
    `cosine_scores` an image counts by its best caption, as by its better view: one that says what
    the prompt says is not held back by four that tell other things."""
    for start in range(0, len(training_set), BLOCK_IMAGES):
        embeddings = np.asarray(training_set.embeddings[start : start + BLOCK_IMAGES], np.float32)
        check_pixels(f"embeddings from {training_set.ids[start]} on", embeddings)
        yield embeddings.reshape(*embeddings.shape[:2], -1).swapaxes(0, 1)


def list_words(text: str) -> set[str]:
    """The different words of a text, in lower case."""
    return set(re.findall(r"\w+", text.lower()))


def word_scores(prompts: Iterable[str], captions: Sequence[str]) -> Iterator[np.ndarray]:
    """Yields each prompt's scores [captions] float64: how many words it and a caption share, over
    how many they have in all (Jaccard); 0 where neither has one. No model has any part in it."""
    owners, sizes = {}, np.empty(len(captions))
    for row, caption in enumerate(captions):
        words = list_words(caption)
        sizes[row] = len(words)
        for word in words:
            owners.setdefault(word, []).append(row)
    for words in map(list_words, prompts):
        shared = np.zeros(len(captions))
        for word in words:
            shared[owners.get(word, [])] += 1
        yield shared / np.maximum(len(words) + sizes - shared, 1)


def normalise(features: np.ndarray) -> np.ndarray:
    """Features of length 1 along the last axis; zeros stay zeros."""
    return features / np.maximum(
        np.linalg.norm(features, axis=-1, keepdims=True), np.finfo(np.float32).tiny
    )


def centre(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Features less the mean, of length 1 along the last axis; 0 where they are the mean but for
    rounding, whose direction says nothing."""
    centred = features - mean
    centred[np.linalg.norm(centred, axis=-1) < ROUNDING * np.linalg.norm(features, axis=-1)] = 0
    return normalise(centred)


def mean_features(
    blocks: Iterable[np.ndarray], progress: Callable[[int], object] = lambda count: None
) -> np.ndarray:
    """Mean of features [views, b, size] over all views and images of the blocks, [size] float32."""
    total, count = np.zeros(()), 0
    for block in blocks:
        total = total + block.sum(axis=(0, 1), dtype=np.float64)
        count = count + block.shape[0] * block.shape[1]
        progress(block.shape[1])
    return (total / count).astype(np.float32)


def cosine_scores(
    queries: np.ndarray,
    blocks: Iterable[np.ndarray],
    mean: np.ndarray,
    progress: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Scores [queries, n] float32: cosine with the better of a candidate's views, both less the
    mean.

    queries: [queries, size]; blocks: features [views, b, size] of n candidates; mean: [size], of
    `mean_features`; `progress(count)` is told of the candidates.
    """
    queries, scores = centre(queries, mean), [np.empty((len(queries), 0), np.float32)]
    for block in blocks:
        scores.append((queries @ centre(block, mean).swapaxes(1, 2)).max(axis=0))
        progress(block.shape[1])
    return np.concatenate(scores, axis=1)


def score_queries(
    encode: Encode,
    blocks: Callable[[], Iterable[np.ndarray]],
    tasks: Sequence[Task],
    dataroot: str | Path,
    progress: Callable[[int], object] = lambda count: None,
) -> Iterator[np.ndarray]:
    """Yields each task's scores [exemplars + n] float32: its exemplars first, then the training
    images. blocks: a function that gives their blocks of features, which are gone through twice:
    `progress` is told of 2 n images."""
    paths = [Path(dataroot) / task.synth_image_path for task in tasks]
    queries = np.concatenate([block[0] for block in encode_blocks(encode, paths)])
    exemplars = list(dict.fromkeys(path for task in tasks for path in task.exemplar_paths))
    mean = mean_features(blocks(), progress)
    exemplar_scores = cosine_scores(queries, encode_blocks(encode, exemplars), mean)
    training_scores = cosine_scores(queries, blocks(), mean, progress)
    columns = {path: column for column, path in enumerate(exemplars)}
    for row, task in enumerate(tasks):
        yield np.concatenate(
            [
                exemplar_scores[row, [columns[path] for path in task.exemplar_paths]],
                training_scores[row],
            ]
        )
