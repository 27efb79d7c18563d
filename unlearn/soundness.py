"""Whether a pipeline from others may be loaded, and can be used: before anything is built or scored."""

from pathlib import Path

import torch

from . import UserError
from .reading import read_json
from .runtime import is_out_of_memory

MODULES = (None, "diffusers", "transformers", "stable_diffusion")  # the last is the safety checker's, which is not loaded
MOST_LAYERS, MOST_OF_A_SIZE = 100, 1_000_000  # in a model's configuration


def check_classes(folder):
    """Raises UserError where a pipeline's model_index.json names classes of other modules than the two libraries': files beside it,
    say, which some versions of diffusers would run."""
    path = Path(folder) / "model_index.json"
    index = read_json(path, "--sd_version")
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UserError(f"--sd_version {folder}: {path.name}: expected an object whose _class_name is a pipeline of diffusers")
    for part, value in index.items():
        if isinstance(value, list) and (not value or value[0] not in MODULES):
            raise UserError(f"--sd_version {folder}: {path.name}: {part}: expected a class of diffusers or transformers, found {value!r:.80}")


def check_sizes(folder, parts=("unet", "vae", "text_encoder", "scheduler")):
    """Raises UserError where a configuration of a pipeline's folder asks for absurdly much: it would be built before its weights
    are looked at."""
    def visit(path, key, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                visit(path, name, inner)
        elif isinstance(value, list):
            for inner in value:
                visit(path, key, inner)
        elif isinstance(value, int) and abs(value) > (MOST_LAYERS if "layers" in key else MOST_OF_A_SIZE):
            raise UserError(f"--sd_version {folder}: {path.parent.name}/{path.name}: {key}: found {str(value):.20}, which is no size of such a model")

    for part in parts:
        for path in sorted((Path(folder) / part).glob("*config.json")):
            visit(path, part, read_json(path, "--sd_version"))


@torch.no_grad()
def check_passes(model, name):
    """Raises UserError where one of a model's parts cannot take the least that it is asked for: a configuration may be absurd and
    yet load."""
    pipeline, device = model.pipeline, model.device
    small = torch.zeros(1, model.denoiser.config.in_channels, 16, 16, device=device)
    passes = {
        "vae": lambda: pipeline.vae.encode(torch.zeros(1, 3, 8 * pipeline.vae_scale_factor, 8 * pipeline.vae_scale_factor, device=device)),
        "text_encoder": lambda: pipeline.text_encoder(torch.zeros(1, model.embedding_shape[0], dtype=torch.int64, device=device)),
        "unet": lambda: model.predict(small, torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, *model.embedding_shape, device=device))}
    for part, run in passes.items():
        try:
            run()
        except Exception as error:  # whatever the libraries raise
            if is_out_of_memory(error):
                raise
            raise UserError(f"--sd_version {name}: its {part} cannot be used as configured ({(str(error).splitlines() or ['?'])[0]:.200})") from None
