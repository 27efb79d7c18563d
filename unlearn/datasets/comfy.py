"""ComfyUI's graphs: the prompt that a sampler was given, found by its links, or why it is not
certain.

A graph is {node id: {"class_type": ..., "inputs": {name: value or [node id, output]}}}: `prompt` in
PNG's texts, in WebP's EXIF behind `prompt:`. The editor's own form, `workflow`, has values without
names; those of the commonest nodes are known here. Source: Comfy-Org/ComfyUI, nodes.py
"""

from collections.abc import Callable

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

MOST_NODES, DEEPEST = 5000, 100
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
# Nodes that make a prompt of texts, and the inputs that hold these.
ENCODERS = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "CLIPTextEncodeSD3": ("t5xxl", "clip_g", "clip_l"),
    "CLIPTextEncodeFlux": ("t5xxl", "clip_l"),
    "CLIPTextEncodeHunyuanDiT": ("bert", "mt5xl"),
}
# Nodes that hand a prompt on, and the input that holds it; by output where there are two.
PASSING = {
    "Reroute": ("",),
    "FluxGuidance": ("conditioning",),
    "BasicGuider": ("conditioning",),
    "ControlNetApply": ("conditioning",),
    "ControlNetApplyAdvanced": ("positive", "negative"),
    "ControlNetApplySD3": ("positive", "negative"),
    "InpaintModelConditioning": ("positive", "negative"),
    "ConditioningSetTimestepRange": ("conditioning",),
    "ConditioningSetArea": ("conditioning",),
    "ReferenceLatent": ("conditioning",),
    "unCLIPConditioning": ("conditioning",),
    "StyleModelApply": ("conditioning",),
}
EMPTY = ("ConditioningZeroOut",)
# Nodes that hold one value, and its input.
VALUES = {
    "PrimitiveNode": "value",
    "PrimitiveString": "value",
    "PrimitiveStringMultiline": "value",
    "PrimitiveInt": "value",
    "PrimitiveFloat": "value",
    "String Literal": "string",
    "StringConstant": "string",
    "StringConstantMultiline": "string",
    "Text Multiline": "text",
    "RandomNoise": "noise_seed",
    "KSamplerSelect": "sampler_name",
}
MODELS = {
    "CheckpointLoaderSimple": "ckpt_name",
    "CheckpointLoader": "ckpt_name",
    "UNETLoader": "unet_name",
    "DiffusersLoader": "model_path",
    "UnetLoaderGGUF": "unet_name",
}
# Order of the values of the editor's nodes.
WIDGETS = {
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "CLIPTextEncode": ("text",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "PrimitiveNode": ("value",),
    "RandomNoise": ("noise_seed",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "FluxGuidance": ("guidance",),
}


def read_comfy(texts: dict) -> Generation | None:
    """The Generation of the graph among a file's texts; None where there is none."""
    found = {}
    for name, text in texts.items():
        key, colon, rest = text[:10].partition(":")  # WebP: prompt:{...} in EXIF's Model
        if (
            name in ("Make", "Model", "ImageDescription")
            and colon
            and key.lower() in ("prompt", "workflow")
        ):
            found.setdefault(key.lower(), text[len(key) + 1 :])
    found = {**found, **{name: texts[name] for name in ("prompt", "workflow") if name in texts}}
    graph = check_graph(parse_object(found.get("prompt")))
    if not graph:
        graph = check_graph(name_values(parse_object(found.get("workflow")) or {}))
    return describe_graph(graph) if graph else None


def check_graph(graph: dict | None) -> dict | None:
    """A graph whose nodes are of the form that is expected; None of anything else."""
    if not graph or len(graph) > MOST_NODES:
        return None
    nodes = {
        str(key): node
        for key, node in graph.items()
        if isinstance(node, dict)
        and isinstance(node.get("class_type"), str)
        and isinstance(node.get("inputs"), dict)
    }
    return nodes or None


def name_values(workflow: dict) -> dict:
    """The graph of the editor's form, with the values of the nodes that are known."""
    nodes, links = workflow.get("nodes"), workflow.get("links")
    if not isinstance(nodes, list) or not isinstance(links, list):
        return {}
    sources = {
        link[0]: [str(link[1]), link[2]]
        for link in links
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], int)
    }
    graph = {}
    for node in nodes:
        if not isinstance(node, dict) or node.get("mode") in (2, 4):  # muted, bypassed
            continue
        kind, values = node.get("type"), node.get("widgets_values")
        names = WIDGETS.get(kind, ()) if isinstance(kind, str) else ()
        inputs = dict(zip(names, values)) if isinstance(values, list) else {}
        entries = node.get("inputs")
        for entry in entries if isinstance(entries, list) else []:
            link = entry.get("link") if isinstance(entry, dict) else None
            if isinstance(link, int) and link in sources and isinstance(entry.get("name"), str):
                inputs[entry["name"]] = sources[link]
        graph[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return graph


class Uncertain(Exception):
    """Why a value cannot be told, in words."""


def follow(graph: dict, value: object) -> tuple[dict, int] | None:
    """(node, output) that a link leads to; None where a value is no link. Raises Uncertain where
    the node is missing."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], (str, int)):
        return None
    node = graph.get(str(value[0]))
    if node is None:
        raise Uncertain(f"a link leads to node {value[0]!s:.40}, which is not there")
    return node, value[1] if isinstance(value[1], int) else 0


def find_value(graph: dict, value: object, depth: int = 0) -> object:
    """A value, or the one that its link leads to. Raises Uncertain where a node is not known."""
    target = follow(graph, value)
    if target is None:
        return value
    kind, inputs = target[0]["class_type"], target[0]["inputs"]
    key = "" if kind == "Reroute" else VALUES.get(kind)
    if key is None or key not in inputs:
        raise Uncertain(f"it comes from a node {kind:.60}, which is not known")
    if depth > DEEPEST:
        raise Uncertain("its links go round in a circle")
    return find_value(graph, inputs[key], depth + 1)


def find_prompt(graph: dict, value: object, depth: int = 0) -> str:
    """The text that a link of a sampler leads to. Raises Uncertain where that is not one text, or a
    node on the way is not known."""
    target = follow(graph, value)
    if target is None or depth > DEEPEST:
        raise Uncertain("its links go round in a circle" if target else "it is not linked")
    (node, output), kind = target, target[0]["class_type"]
    if kind in EMPTY:
        return ""
    if kind in ENCODERS:
        held = [node["inputs"][name] for name in ENCODERS[kind] if name in node["inputs"]]
        prompts = [to_prompt(find_value(graph, text)) for text in held]
        texts = {text for text in prompts if text is not None}
        if not texts or None in prompts:
            raise Uncertain(f"{kind} has no text")
        if len(texts - {""}) > 1:
            raise Uncertain(f"{kind} has several texts: {' | '.join(sorted(texts - {''})):.300}")
        return max(texts)
    names = PASSING.get(kind)
    if names is None:
        raise Uncertain(f"it goes through a node {kind:.60}, which is not known")
    return find_prompt(graph, node["inputs"].get(names[min(output, len(names) - 1)]), depth + 1)


def find_model(graph: dict, value: object) -> tuple[str | None, list]:
    """(name of the model that a link leads to, names of LoRA files on the way)."""
    loras = []
    for _ in range(DEEPEST):
        target = follow(graph, value)
        if target is None:
            break
        kind, inputs = target[0]["class_type"], target[0]["inputs"]
        if kind in MODELS:
            return to_text(find_value(graph, inputs.get(MODELS[kind]))), loras
        loras.append(inputs.get("lora_name"))
        value = inputs.get("" if kind == "Reroute" else "model")  # patches leave the name as it is
    raise Uncertain("no loader that is known")


def link_inputs(graph: dict, value: object) -> dict:
    """Inputs of the node that a link leads to; {} where it leads to none."""
    target = follow(graph, value)
    return target[0]["inputs"] if target else {}


def describe_sampler(graph: dict, node: dict) -> tuple[dict, list[str]]:
    """Fields of a Generation that one sampler was given, and notes on those that are not
    certain."""
    inputs, found, notes = node["inputs"], {}, []

    def take(field: str, find: Callable[[], object]) -> None:
        try:
            found[field] = find()
        except Uncertain as error:
            notes.append(f"the {field.replace('_', ' ')} is not certain: {error}")

    def look_up(*places: tuple[dict, str]) -> object:
        return next((find_value(graph, there[key]) for there, key in places if key in there), None)

    guider, sigmas = {}, {}
    take("guider", lambda: guider.update(link_inputs(graph, inputs.get("guider"))))
    take("schedule", lambda: sigmas.update(link_inputs(graph, inputs.get("sigmas"))))
    given = {**inputs, **guider}
    take("prompt", lambda: find_prompt(graph, given.get("positive", given.get("conditioning"))))
    if "negative" in given:
        take("negative_prompt", lambda: find_prompt(graph, given["negative"]))
    seeds = [(inputs, key) for key in ("seed", "noise_seed", "noise")]
    take("seed", lambda: to_integer(look_up(*seeds)))
    take("steps", lambda: to_integer(look_up((inputs, "steps"), (sigmas, "steps"))))
    take("guidance", lambda: to_number(look_up((given, "cfg"))))
    take(
        "sampler",
        lambda: to_sampler(
            look_up((inputs, "sampler_name"), (inputs, "sampler")),
            look_up((inputs, "scheduler"), (sigmas, "scheduler")),
        ),
    )
    take("model", lambda: find_model(graph, given.get("model")))
    found["model"], loras = found.get("model") or (None, [])
    found["loras"] = to_names(loras)
    take("latent", lambda: link_inputs(graph, inputs.get("latent_image")))
    latent = found.pop("latent", {})
    take("size", lambda: to_size(look_up((latent, "width")), look_up((latent, "height"))))
    return {key: found[key] for key in found if key not in ("guider", "schedule")}, notes


def describe_graph(graph: dict) -> Generation:
    """The Generation of a graph. What its samplers do not agree in is a note, not a guess."""
    samplers = [node for node in graph.values() if node["class_type"] in SAMPLERS]
    if not samplers:
        kinds = sorted({node["class_type"] for node in graph.values()})
        return Generation("ComfyUI", notes=[f"no sampler that is known: {', '.join(kinds):.300}"])
    described = [describe_sampler(graph, node) for node in samplers]
    notes = list(dict.fromkeys(note for _, more in described for note in more))
    fields = {}
    for field in dict.fromkeys(key for found, _ in described for key in found):
        told = [found[field] for found, _ in described if field in found]
        values = list(dict.fromkeys(value for value in told if value not in (None, ())))
        if len(values) == 1 and len(told) == len(described):
            fields[field] = values[0]
        elif len(values) > 1:
            shown = " | ".join(f"{value!s:.100}" for value in values[:4])
            notes.append(
                f"its {len(samplers)} samplers differ in {field.replace('_', ' ')}: {shown}"
            )
    return Generation("ComfyUI", **fields, notes=notes)
