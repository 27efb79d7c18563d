"""Whether a pipeline from others may be loaded, whether its parts fit each other, and whether it
can be used: before anything is built or scored."""

import codecs
import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..errors import UserError
from ..runtime.programs import is_out_of_memory
from ..storage.reading import list_visible, read_json

if TYPE_CHECKING:
    from .pipelines import Model
from .parts import CLASSES, Parts, class_names, read_index, read_parts
from .weights import check_weights

MODULES = (
    None,
    "diffusers",
    "transformers",
    "stable_diffusion",
)  # the last is the safety checker's, which is not loaded


MOST_LAYERS, MOST_OF_A_SIZE = 100, 1_000_000  # in a model's configuration


PARTS = ("unet", "vae", "text_encoder", "tokenizer")


PREDICTIONS = ("epsilon", "sample", "v_prediction")


OTHER_FAMILIES = {
    "transformer": "a transformer instead of a UNet, as Stable Diffusion 3, FLUX and PixArt have",
    "text_encoder_2": "a second text encoder, as Stable Diffusion XL has",
}


MORE_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
)  # of a UNet


def check_marks(folder: str | Path) -> None:
    """Raises UserError where a JSON file of a pipeline begins with a byte order mark, which the
    libraries that read it do not drop."""
    for path in [Path(folder) / "model_index.json", *list_visible(folder, "*/*.json")]:
        with open(path, "rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                raise UserError(
                    f"--sd_version {folder}: {path} begins with a byte order mark, which "
                    f"diffusers does not read; remove it: "
                    f"sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(str(path))}"
                )


def check_classes(name: str | Path, index: Any, unet: str = "") -> None:
    """Raises UserError where a pipeline's index (model_index.json) names classes of other modules
    than the two libraries': files beside it, say, which some versions of diffusers would run; or
    parts of another family than Stable Diffusion 1 and 2. unet: the folder of a UNet that is used
    instead, or ""."""
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"--sd_version {name}: model_index.json: expected an object whose _class_name is a "
            f"pipeline of diffusers"
        )
    for part, value in index.items():
        if isinstance(value, list) and (not value or value[0] not in MODULES):
            raise UserError(
                f"--sd_version {name}: model_index.json: {part}: expected a class of diffusers "
                f"or transformers, found {value!r:.80}"
            )
    classes = class_names(index)
    for part, what in OTHER_FAMILIES.items():
        if part in classes:
            raise UserError(
                f"--sd_version {name}: {index['_class_name']} has {what} ({part}: "
                f"{classes[part]}); supported are Stable "
                "Diffusion 1 and 2 and models of their kind"
            )
    for part, known in CLASSES.items():
        if part in classes and classes[part] not in known and not (unet and part == "unet"):
            raise UserError(
                f"--sd_version {name}: its {part} is of the class {classes[part]}; supported: "
                f"{', '.join(known)}"
            )


def check_sizes(
    folder: str | Path, parts: Sequence[str] = ("unet", "vae", "text_encoder", "scheduler")
) -> None:
    """Raises UserError where a configuration of a pipeline's folder asks for absurdly much: it
    would be built before its weights are looked at."""

    def visit(path, key, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(path, name, inner)
        elif isinstance(value, list):
            for inner in value:
                visit(path, key, inner)
        elif isinstance(value, int) and abs(value) > (
            MOST_LAYERS if "layers" in key else MOST_OF_A_SIZE
        ):
            raise UserError(
                f"--sd_version {folder}: {path.parent.name}/{path.name}: {key}: found "
                f"{str(value):.20}, which is no size of such a model"
            )

    for part in parts:
        for path in list_visible(Path(folder) / part, "*config.json"):
            visit(path, part, read_json(path, "--sd_version"))


def guess_unet(given: object, made: object, latent: int) -> str:
    """What a UNet probably is that takes `given` channels and gives `made`, where latents have
    `latent`."""
    kinds = {
        2 * latent + 1: "an inpainting UNet",
        2 * latent: "the UNet of InstructPix2Pix or of a latent upscaler",
        latent + 3: "an upscaler's UNet",
        latent + 1: "a depth-to-image UNet",
    }
    if given == latent and made == 2 * latent:
        return "a UNet that predicts variances too (learned sigma)"
    return next(
        (kind for number, kind in kinds.items() if number == given),
        "UNet and VAE of different models",
    )


def check_fit(name: str | Path, parts: Parts, unet: str = "") -> None:
    """Raises UserError, naming the numbers and what it probably is, where the parts of a pipeline
    do not fit each other, or one of them lacks what attribution asks of it."""

    def refuse(text):
        raise UserError(f"--sd_version {name}: {text}")

    which, latent = f"the UNet of {unet}" if unet else "its UNet", parts.vae.get("latent_channels")
    given, made = parts.unet.get("in_channels"), parts.unet.get("out_channels")
    if not isinstance(latent, int) or not given == made == latent:
        guess = (
            guess_unet(given, made, latent)
            if isinstance(latent, int)
            else "parts of different models"
        )
        refuse(
            f"{which} takes {given!s:.20} channels and gives {made!s:.20}, its VAE's latents "
            f"have {latent!s:.20} (probably {guess}); "
            "expected one number: a UNet that makes pictures from text alone"
        )
    if (colours := (parts.vae.get("in_channels"), parts.vae.get("out_channels"))) != (3, 3):
        refuse(
            f"its VAE takes {colours[0]!s:.20} channels and gives {colours[1]!s:.20}; expected "
            f"3, a picture's"
        )
    if needs := [key for key in MORE_INPUTS if parts.unet.get(key) is not None]:
        refuse(
            f"{which} takes more than noisy latents, a timestep and a text ({needs[0]} is "
            f"{parts.unet[needs[0]]!s:.40}), as the UNets of "
            "Stable Diffusion XL, upscalers and image variations do; supported are Stable "
            "Diffusion 1 and 2 and models of their kind"
        )
    check_text_encoder(parts, which, refuse)
    check_schedule(parts, refuse)
    scaling = parts.vae.get("scaling_factor")
    if (
        not isinstance(scaling, (int, float))
        or isinstance(scaling, bool)
        or not 0 < scaling < math.inf
    ):
        refuse(f"its VAE's scaling_factor: expected a number, found {scaling!r:.80}")


def check_text_encoder(parts: Parts, which: str, refuse: Callable[[str], NoReturn]) -> None:
    """The part of `check_fit` that concerns texts."""
    text, name = parts.text_encoder, parts.classes.get("text_encoder")
    for key, value in text.items():
        if not isinstance(value, int):
            refuse(
                f"its text encoder, {name}, has no {key}, as T5 has none of positions; expected "
                f"one like CLIPTextModel"
            )
    widths = parts.unet.get("cross_attention_dim")
    if any(
        width != text["hidden_size"]
        for width in (widths if isinstance(widths, (list, tuple)) else [widths])
    ):
        refuse(
            f"{which} attends to texts of {widths!s:.60} features, its text encoder's have "
            f"{text['hidden_size']}: they are of different models"
        )
    if isinstance(parts.vocabulary, int) and parts.vocabulary > text["vocab_size"]:
        refuse(
            f"its tokenizer numbers {parts.vocabulary} tokens, its text encoder has "
            f"{text['vocab_size']}: they are of different models"
        )
    if parts.tokens is not None and (
        not isinstance(parts.tokens, int) or not 2 < parts.tokens <= text["max_position_embeddings"]
    ):
        refuse(
            f"its tokenizer's model_max_length: expected 3 to {text['max_position_embeddings']}, "
            f"as its text encoder has positions, "
            f"found {parts.tokens!s:.40}"
        )


def check_schedule(parts: Parts, refuse: Callable[[str], NoReturn]) -> None:
    """The part of `check_fit` that concerns the scheduler."""
    scheduler, name = parts.scheduler, type(parts.scheduler).__name__
    alpha_bars = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(alpha_bars, torch.Tensor):
        refuse(
            f"its scheduler, {name}, has no "
            f"alphas_cumprod{', because it matches flows' if 'Flow' in name else ''}; supported "
            f"are those "
            "of noise that is added by a schedule of betas, such as DDPMScheduler"
        )
    if (
        not isinstance(kind := scheduler.config.get("prediction_type", "epsilon"), str)
        or kind not in PREDICTIONS
    ):
        refuse(f"unknown prediction type {kind!s:.80}; expected one of {', '.join(PREDICTIONS)}")
    if len(alpha_bars) != (count := scheduler.config.get("num_train_timesteps")):
        refuse(
            f"its scheduler has {len(alpha_bars)} noise levels (trained_betas) for {count!s:.20} "
            f"timesteps (num_train_timesteps)"
        )
    if not ((alpha_bars >= 0) & (alpha_bars <= 1)).all():  # so written, NaN is refused
        refuse(
            "its scheduler's noise levels (alphas_cumprod) are not all between 0 and 1: its "
            "betas are damaged"
        )


def check_pipeline(folder: str | Path, unet: str = "") -> None:
    """Raises UserError where the configurations of a pipeline's folder tell that it may not be
    loaded, or cannot be used. No model is loaded. unet: the folder of a UNet that is used instead
    of its own, or ""."""
    index = read_index(folder)
    check_marks(folder)
    check_classes(folder, index, unet)
    for part in (*PARTS, "scheduler"):
        if not (Path(folder) / part).exists() and not (unet and part in ("unet", "scheduler")):
            raise UserError(
                f"--sd_version {folder}: a folder without {part} is no Stable Diffusion pipeline "
                f"in diffusers' format"
            )
    check_sizes(folder)
    if unet:
        check_sizes(Path(unet).parent, [Path(unet).name])
    check_fit(folder, read_parts(folder, unet), unet)
    check_weights(Path(folder), unet)


@torch.no_grad()
def check_passes(model: "Model", name: str | Path) -> None:
    """Raises UserError where one of a model's parts cannot take the least that it is asked for: a
    configuration may be absurd and yet load."""
    pipeline, device = model.pipeline, model.device
    small = torch.zeros(1, model.denoiser.config["in_channels"], 16, 16, device=device)
    pixels = torch.zeros(
        1, 3, 8 * pipeline.vae_scale_factor, 8 * pipeline.vae_scale_factor, device=device
    )
    passes = {  # part -> (what it is asked, the shape that it must give)
        "vae": (lambda: pipeline.vae.encode(pixels).latent_dist.mean, (1, small.shape[1], 8, 8)),
        "text_encoder": (
            lambda: (
                pipeline.text_encoder(
                    torch.zeros(1, model.embedding_shape[0], dtype=torch.int64, device=device)
                ).last_hidden_state
            ),
            (1, *model.embedding_shape),
        ),
        "unet": (
            lambda: model.predict(
                small,
                torch.zeros(1, dtype=torch.int64, device=device),
                torch.zeros(1, *model.embedding_shape, device=device),
            ),
            small.shape,
        ),
    }
    for part, (run, shape) in passes.items():
        try:
            found = run().shape
        except Exception as error:  # whatever the libraries raise
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"--sd_version {name}: its {part} cannot be used as configured "
                f"({(str(error).splitlines() or ['?'])[0]:.200})"
            ) from None
        if found != shape:
            raise UserError(
                f"--sd_version {name}: its {part} cannot be used: it gives {list(found)} where "
                f"{list(shape)} is expected"
            )
