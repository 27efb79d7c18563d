"""What programs write into the pictures that they make, but for ComfyUI's graphs (`comfy`): a
function for each form, which gives None where the texts of a file are not of that form."""

import json
import re

from .generation import (
    Generation,
    parse_object,
    to_integer,
    to_names,
    to_number,
    to_prompt,
    to_sampler,
    to_size,
    to_text,
)

LONGEST_SETTINGS = 20_000  # characters of the line of settings that AUTOMATIC1111 writes
LONGEST_DREAM = 4000
SETTING = re.compile(r'([A-Za-z][\w /()-]{0,60}): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
LORA = re.compile(r"<lora:([^:<>\n]{1,200})[:>]")
DREAM = re.compile(r'"(.*)"((?: -\w ?\S+)*)', re.DOTALL)
HASH = re.compile(r"(.*?) ([0-9A-F]{8})")
# Names of one quantity, as diffusers' own arguments and tools on top of it spell them.
ARGUMENTS = {
    "prompt": ("prompt", "Prompt"),
    "negative_prompt": ("negative_prompt", "negativePrompt", "Negative Prompt"),
    "seed": ("seed", "Seed"),
    "steps": ("num_inference_steps", "steps", "Steps"),
    "guidance": ("guidance_scale", "cfg_scale", "guidance", "Guidance Scale"),
    "sampler": ("sampler_name", "sampler", "scheduler", "Sampler"),
    "model": ("model", "model_id", "base_model", "use_stable_diffusion_model"),
    "model_hash": ("model_hash", "base_model_hash"),
    "width": ("width", "Width"),
    "height": ("height", "Height"),
}


def read_webui(texts: dict) -> Generation | None:
    """AUTOMATIC1111's web UI and its kin (Forge, SD.Next, savers of ComfyUI): the prompt, a line
    `Negative prompt: ...`, and a line `Steps: 20, Sampler: Euler a, ...`, in PNG's `parameters` or
    EXIF's UserComment. Source: AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py"""
    for name in "parameters", "UserComment", "comment":
        lines = texts.get(name, "").replace("\r\n", "\n").split("\n")
        starts = [number for number, line in enumerate(lines) if line.startswith("Steps: ")]
        if starts:
            return parse_webui(lines[: starts[-1]], " ".join(lines[starts[-1] :]))
    return None


def parse_webui(lines: list[str], settings: str) -> Generation:
    """Generation of the lines before the settings, and of these."""
    said = {}
    for name, value in SETTING.findall(settings[:LONGEST_SETTINGS]):
        said.setdefault(name.strip(), unquote(value.strip()))
    marks = [number for number, line in enumerate(lines) if line.startswith("Negative prompt:")]
    end = marks[0] if marks else len(lines)
    prompt = "\n".join(lines[:end])
    negative = "\n".join(lines[end:]).removeprefix("Negative prompt:")
    version, size = said.get("Version", ""), said.get("Size", "").split("x")
    program = "AUTOMATIC1111"
    if re.match(r"f\d|.*forge", version, re.IGNORECASE):
        program = "Forge"
    elif "App" in said or version.startswith("ComfyUI"):
        program = said.get("App", version.split(" ")[0])
    notes = []
    if "Denoising strength" in said:
        notes.append("made in several passes, or from another picture (Denoising strength)")
    return Generation(
        to_text(program),
        to_prompt(prompt),
        to_prompt(negative) if marks else None,
        to_integer(said.get("Seed")),
        to_integer(said.get("Steps")),
        to_number(said.get("CFG scale")),
        to_sampler(said.get("Sampler"), said.get("Schedule type")),
        to_text(said.get("Model")),
        to_text(said.get("Model hash")),
        to_size(*size) if len(size) == 2 else None,
        to_names(LORA.findall(prompt)),
        notes,
    )


def unquote(value: str) -> str:
    """A setting's value, which stands in JSON's quotes where it holds commas."""
    if not value.startswith('"'):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def read_invokeai(texts: dict) -> Generation | None:
    """InvokeAI 3 and later. Source: invoke-ai/InvokeAI, invokeai/app/invocations/metadata.py"""
    said = parse_object(texts.get("invokeai_metadata"))
    if said is None:
        return None
    model, loras = said.get("model"), said.get("loras")
    model = model if isinstance(model, dict) else {"name": model}
    parts = [lora for lora in loras if isinstance(lora, dict)] if isinstance(loras, list) else []
    named = [part.get("model", part.get("lora")) for part in parts]
    named = [part for part in named if isinstance(part, dict)]
    return Generation(
        "InvokeAI",
        to_prompt(said.get("positive_prompt")),
        to_prompt(said.get("negative_prompt")),
        to_integer(said.get("seed")),
        to_integer(said.get("steps")),
        to_number(said.get("cfg_scale")),
        to_sampler(said.get("scheduler")),
        to_text(model.get("name", model.get("model_name"))),
        to_text(model.get("hash")),
        to_size(said.get("width"), said.get("height")),
        to_names(part.get("name", part.get("model_name")) for part in named),
    )


def read_invokeai_old(texts: dict) -> Generation | None:
    """InvokeAI 1 and 2: `sd-metadata`, or the command line in `Dream`."""
    said = parse_object(texts.get("sd-metadata", texts.get("Sd-metadata")))
    dream = DREAM.fullmatch(texts.get("Dream", "")[:LONGEST_DREAM])
    if said is not None and isinstance(said.get("image"), dict):
        image = said["image"]
        prompt = image.get("prompt")
        parts = prompt if isinstance(prompt, list) else [{"prompt": prompt}]
        prompt = " ".join(
            part["prompt"]
            for part in parts
            if isinstance(part, dict) and to_text(part.get("prompt"))
        )
    elif dream:
        flags = dict(re.findall(r"-(\w) ?(\S+)", dream[2]))
        names = {"s": "steps", "S": "seed", "W": "width", "H": "height", "C": "cfg_scale"}
        names["A"] = "sampler"
        image, said = {names[key]: flags[key] for key in flags if key in names}, {}
        prompt = dream[1]
    else:
        return None
    negative = re.findall(r"\[([^\[\]]*)\]", prompt)
    return Generation(
        "InvokeAI",
        to_prompt(re.sub(r"\[[^\[\]]*\]", "", prompt)),
        to_prompt(", ".join(negative)) if negative else None,
        to_integer(image.get("seed")),
        to_integer(image.get("steps")),
        to_number(image.get("cfg_scale")),
        to_sampler(image.get("sampler")),
        to_text(said.get("model_weights")),
        to_text(said.get("model_hash")),
        to_size(image.get("width"), image.get("height")),
    )


def read_novelai(texts: dict) -> Generation | None:
    """NovelAI: settings as JSON in `Comment`, the model and its hash in `Source`."""
    said = parse_object(texts.get("Comment"))
    if texts.get("Software") != "NovelAI" or said is None:
        return None
    source = HASH.fullmatch(texts.get("Source", "")[:300])
    return Generation(
        "NovelAI",
        to_prompt(said.get("prompt", texts.get("Description"))),
        to_prompt(said.get("uc")),
        to_integer(said.get("seed")),
        to_integer(said.get("steps")),
        to_number(said.get("scale")),
        to_sampler(said.get("sampler"), said.get("noise_schedule")),
        to_text(source[1] if source else texts.get("Source")),
        source[2] if source else None,
        to_size(said.get("width"), said.get("height")),
    )


def read_swarm(texts: dict) -> Generation | None:
    """SwarmUI: `sui_image_params` of the JSON in `parameters`, or in EXIF's UserComment."""
    for name in "parameters", "UserComment":
        said = (parse_object(texts.get(name)) or {}).get("sui_image_params")
        if isinstance(said, dict):
            loras = said.get("loras")
            return Generation(
                "SwarmUI",
                to_prompt(said.get("prompt")),
                to_prompt(said.get("negativeprompt")),
                to_integer(said.get("seed")),
                to_integer(said.get("steps")),
                to_number(said.get("cfgscale")),
                to_sampler(said.get("sampler", said.get("comfyuisampler")), said.get("scheduler")),
                to_text(said.get("model")),
                None,
                to_size(said.get("width"), said.get("height")),
                to_names(loras if isinstance(loras, list) else [loras]),
            )
    return None


def read_fooocus(texts: dict) -> Generation | None:
    """Fooocus: JSON in `parameters` beside `fooocus_scheme`; in EXIF, UserComment and MakerNote."""
    said = parse_object(texts.get("parameters", texts.get("UserComment")))
    scheme = texts.get("fooocus_scheme", texts.get("MakerNote"))
    if said is None or scheme != "fooocus":
        return None
    size = re.fullmatch(r"\((\d{1,6}), ?(\d{1,6})\)", str(said.get("resolution"))[:40])
    found = read_names(said)
    found["sampler"] = to_sampler(said.get("sampler"), said.get("scheduler"))
    found["size"] = to_size(*size.groups()) if size else None
    styled = [f"it was expanded by styles ({said['styles']!s:.200})"] if said.get("styles") else []
    return Generation("Fooocus", **found, notes=styled)


def read_arguments(texts: dict) -> Generation | None:
    """Programs that write diffusers' own arguments, as JSON in one text or each in its own (Easy
    Diffusion). The least certain form, so the last that is tried."""
    names = ("parameters", "metadata", "Comment", "comment", "UserComment", "ImageDescription")
    objects = [parse_object(texts.get(name)) for name in (*names, "generation_data")]
    for said in [*objects, texts]:
        known = {
            key
            for key in ("steps", "guidance", "seed")
            for name in ARGUMENTS[key]
            if said and name in said
        }
        found = read_names(said) if known else {}
        if found.get("prompt") is not None and parse_object(found["prompt"]) is None:
            tool = "Easy Diffusion" if "use_stable_diffusion_model" in said else None
            return Generation(tool or to_text(texts.get("Software")) or "diffusers", **found)
    return None


def read_names(said: dict) -> dict:
    """Fields of a Generation from an object in which each has one of its ARGUMENTS' names."""
    value = {
        key: next((said[name] for name in names if name in said), None)
        for key, names in ARGUMENTS.items()
    }
    return {
        "prompt": to_prompt(value["prompt"]),
        "negative_prompt": to_prompt(value["negative_prompt"]),
        "seed": to_integer(value["seed"]),
        "steps": to_integer(value["steps"]),
        "guidance": to_number(value["guidance"]),
        "sampler": to_sampler(value["sampler"]),
        "model": to_text(value["model"]),
        "model_hash": to_text(value["model_hash"]),
        "size": to_size(value["width"], value["height"]),
    }
