"""What a picture's file says of how it was made: each program's form, and nothing that is not
there; hostile files give notes, never a traceback or a long wait."""

import copy
import json
import struct
import time
import zlib

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from unlearn import UserError
from unlearn.datasets.generation import Generation, to_integer, to_number
from unlearn.datasets.metadata import read_generation

WEBUI = (
    "a red apple, <lora:fruit:0.8>\non a table\n"
    "Negative prompt: blurry,\nbad\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 18446744073709551615, "
    'Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Lora hashes: "fruit: 12ab, b: 34", '
    "Version: v1.10.1"
)
GRAPH = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 2**53 + 1,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red apple", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["10", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "is_changed": [float("nan")]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {"lora_name": "fruit.safetensors", "model": ["4", 0], "clip": ["4", 1]},
    },
}
COMFY = Generation(
    "ComfyUI",
    "a red apple",
    "blurry",
    2**53 + 1,
    20,
    8.0,
    "euler normal",
    "sd15.safetensors",
    None,
    (512, 640),
    ("fruit.safetensors",),
)


def png(path, **texts):
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        info.add_itxt(name.replace("__", "-"), text)
    Image.new("RGB", (8, 8), "red").save(path, pnginfo=info)
    return path


def read(tmp_path, **texts):
    return read_generation(png(tmp_path / "picture.png", **texts))


def graph(**changes):
    """GRAPH with some nodes replaced; "3.positive" is an input of node 3."""
    changed = copy.deepcopy(GRAPH)
    for place, value in changes.items():
        node, _, name = place.removeprefix("n").partition("_")
        if name:
            changed[node]["inputs"][name] = value
        else:
            changed[node] = value
    return json.dumps(changed)


def test_automatic1111s_line_is_read_from_png(tmp_path):
    assert read(tmp_path, parameters=WEBUI) == Generation(
        "AUTOMATIC1111",
        "a red apple, <lora:fruit:0.8>\non a table",
        "blurry,\nbad",
        2**64 - 1,
        20,
        7.5,
        "DPM++ 2M Karras",
        "v1-5",
        "6ce0161689",
        (512, 768),
        ("fruit",),
    )


@pytest.mark.parametrize(
    "kind, encode",
    [
        ("jpg", lambda text: b"UNICODE\0" + text.encode("utf-16-be")),
        ("jpg", lambda text: b"UNICODE\0" + text.encode("utf-16-le")),
        ("webp", lambda text: b"UNICODE\0" + text.encode("utf-16")),
        ("webp", lambda text: b"ASCII\0\0\0" + text.encode()),
        ("jpg", lambda text: b"\0" * 8 + text.encode()),
        ("jpg", lambda text: text.encode()),
    ],
)
def test_the_same_line_is_read_from_exif_however_it_is_encoded(kind, encode, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = encode("赤い " + WEBUI)
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{kind}", exif=exif)
    found = read_generation(tmp_path / f"a.{kind}")
    assert found.prompt.startswith("赤い a red apple") and found.seed == 2**64 - 1
    assert not found.notes


@pytest.mark.parametrize(
    "version, program",
    [
        ("Version: f2.0.1v1.10.1-previous-313", "Forge"),
        ("Version: ComfyUI", "ComfyUI"),
        ("Version: 12ab, App: SD.Next", "SD.Next"),
    ],
)
def test_kin_of_automatic1111_are_told_by_their_version(version, program, tmp_path):
    text = "x\nSteps: 4, Seed: 1, Denoising strength: 0.5, " + version
    found = read(tmp_path, parameters=text)
    assert (found.program, found.prompt, found.negative_prompt) == (program, "x", None)
    assert found.notes == ["made in several passes, or from another picture (Denoising strength)"]


def test_an_empty_prompt_is_a_prompt_and_a_photographs_comment_is_none(tmp_path):
    assert read(tmp_path, parameters="\nSteps: 4, Seed: 1, Size: 8x8").prompt == ""
    found = read(tmp_path, comment="Steps to the beach", Description="my holiday")
    assert found == Generation(notes=["the file does not say how it was made"])


def test_comfyuis_prompt_is_found_by_the_samplers_links(tmp_path):
    assert read(tmp_path, prompt=graph(), workflow="{}") == COMFY


def test_comfyuis_graph_is_read_from_webps_exif(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "workflow:{}"
    exif[ExifTags.Base.Model] = "prompt:" + graph()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", exif=exif)
    assert read_generation(tmp_path / "a.webp") == COMFY


def test_the_editors_form_alone_gives_the_same_as_the_graph(tmp_path):
    order = {
        "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
        "LoraLoader": ("lora_name",),
        "CheckpointLoaderSimple": ("ckpt_name",),
        "EmptyLatentImage": ("width", "height"),
        "CLIPTextEncode": ("text",),
    }
    nodes, links = [], []
    for key, node in GRAPH.items():
        inputs = []
        for name, value in node["inputs"].items():
            if isinstance(value, list) and len(value) == 2:
                links.append([len(links), int(value[0]), value[1], int(key), 0, "*"])
                inputs.append({"name": name, "link": links[-1][0]})
        kind = node["class_type"]
        values = [node["inputs"].get(name, "randomize") for name in order.get(kind, ())]
        nodes.append({"id": int(key), "type": kind, "inputs": inputs, "widgets_values": values})
    muted = {"id": 99, "type": "KSampler", "mode": 2, "inputs": [], "widgets_values": [7]}
    workflow = json.dumps({"nodes": [*nodes, muted], "links": links})
    assert read(tmp_path, workflow=workflow) == COMFY


def test_prompts_pass_through_known_nodes_and_texts_of_their_own(tmp_path):
    found = read(
        tmp_path,
        prompt=graph(
            n3_positive=["20", 0],
            n3_negative=["20", 1],
            n20={
                "class_type": "ControlNetApplyAdvanced",
                "inputs": {"positive": ["6", 0], "negative": ["21", 0], "strength": 1},
            },
            n21={"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["7", 0]}},
            n6_text=["22", 0],
            n22={"class_type": "PrimitiveStringMultiline", "inputs": {"value": "from afar"}},
        ),
    )
    assert (found.prompt, found.negative_prompt, found.notes) == ("from afar", "", [])


def test_custom_samplers_are_followed_to_guider_noise_and_schedule(tmp_path):
    changed = json.loads(graph())
    changed["3"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["30", 0],
            "guider": ["31", 0],
            "sampler": ["32", 0],
            "sigmas": ["33", 0],
            "latent_image": ["5", 0],
        },
    }
    changed["30"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 5}}
    changed["31"] = {
        "class_type": "BasicGuider",
        "inputs": {"model": ["10", 0], "conditioning": ["34", 0]},
    }
    changed["32"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    changed["33"] = {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 4}}
    changed["34"] = {
        "class_type": "FluxGuidance",
        "inputs": {"guidance": 3.5, "conditioning": ["6", 0]},
    }
    found = read(tmp_path, prompt=json.dumps(changed))
    assert (found.prompt, found.negative_prompt) == ("a red apple", None)
    assert (found.seed, found.steps, found.sampler) == (5, 4, "euler simple")
    assert found.model == "sd15.safetensors" and found.size == (512, 640) and not found.notes


def test_several_samplers_that_agree_are_one_and_those_that_differ_are_told(tmp_path):
    second = copy.deepcopy(GRAPH["3"])
    second["inputs"]["latent_image"] = ["3", 0]
    assert read(tmp_path, prompt=graph(n40=second)) == COMFY
    second["inputs"].update(positive=["41", 0], seed=6)
    other = {"class_type": "CLIPTextEncode", "inputs": {"text": "a pear"}}
    found = read(tmp_path, prompt=graph(n40=second, n41=other))
    assert found.prompt is None and found.seed is None and found.steps == 20
    assert found.notes == [
        "its 2 samplers differ in prompt: a red apple | a pear",
        f"its 2 samplers differ in seed: {2**53 + 1} | 6",
    ]


@pytest.mark.parametrize(
    "changes, note",
    [
        (
            {"n6": {"class_type": "Prompt Styler", "inputs": {"text": "a"}}},
            "the prompt is not certain: it goes through a node Prompt Styler, which is not known",
        ),
        (
            {"n6_text": ["9", 0]},
            "the prompt is not certain: it comes from a node SaveImage, which is not known",
        ),
        ({"n3_positive": ["77", 0]}, "the prompt is not certain: a link leads to node 77"),
        ({"n3_positive": "words"}, "the prompt is not certain: it is not linked"),
        ({"n3_positive": [{}, 0]}, "the prompt is not certain: it is not linked"),
        ({"n6_text": 5}, "the prompt is not certain: CLIPTextEncode has no text"),
        (
            {"n6": {"class_type": "Reroute", "inputs": {"": ["6", 0]}}},
            "the prompt is not certain: its links go round in a circle",
        ),
        (
            {"n6": {"class_type": "CLIPTextEncodeSDXL", "inputs": {"text_g": "a", "text_l": "b"}}},
            "the prompt is not certain: CLIPTextEncodeSDXL has several texts: a | b",
        ),
    ],
)
def test_what_is_not_certain_in_a_graph_is_said_and_not_guessed(changes, note, tmp_path):
    found = read(tmp_path, prompt=graph(**changes))
    assert found.prompt is None and found.negative_prompt == "blurry" and found.steps == 20
    assert len(found.notes) == 1 and found.notes[0].startswith(note)


def test_a_graph_without_a_sampler_that_is_known_names_its_nodes(tmp_path):
    found = read(tmp_path, prompt=json.dumps({"1": {"class_type": "MySampler", "inputs": {}}}))
    assert found == Generation("ComfyUI", notes=["no sampler that is known: MySampler"])


def test_invokeais_forms_new_and_old_are_read(tmp_path):
    new = {
        "positive_prompt": "a red apple",
        "negative_prompt": "blurry",
        "seed": 42,
        "steps": 30,
        "cfg_scale": 7.5,
        "scheduler": "euler",
        "width": 512,
        "height": 640,
        "model": {"key": "1", "hash": "blake3:12", "name": "sd15"},
        "loras": [{"model": {"name": "fruit"}, "weight": 0.75}, None],
    }
    expected = Generation(
        "InvokeAI", "a red apple", "blurry", 42, 30, 7.5, "euler", "sd15", "blake3:12", (512, 640)
    )
    assert read(tmp_path, invokeai_metadata=json.dumps(new)) == Generation(
        **{**vars(expected), "loras": ("fruit",)}
    )
    image = {
        "prompt": [{"prompt": "a red apple [blurry]", "weight": 1}],
        "seed": 42,
        "steps": 30,
        "cfg_scale": 7.5,
        "sampler": "euler",
        "width": 512,
        "height": 640,
    }
    old = {"model_weights": "sd15", "model_hash": "blake3:12", "image": image}
    assert read(tmp_path, sd__metadata=json.dumps(old)) == expected
    dream = '"a red apple [blurry]" -s 30 -S 42 -W 512 -H 640 -C 7.5 -A euler'
    assert read(tmp_path, Dream=dream) == Generation(
        **{**vars(expected), "model": None, "model_hash": None}
    )


def test_novelai_swarmui_fooocus_and_tools_on_diffusers_are_read(tmp_path):
    nai = {"prompt": "a red apple", "uc": "blurry", "steps": 28, "scale": 5.0, "seed": 9}
    found = read(
        tmp_path,
        Software="NovelAI",
        Source="NovelAI Diffusion V4 37442FCA",
        Comment=json.dumps({**nai, "sampler": "k_euler", "width": 832, "height": 1216}),
    )
    assert found == Generation(
        "NovelAI",
        *("a red apple", "blurry", 9, 28, 5.0, "k_euler", "NovelAI Diffusion V4", "37442FCA"),
        (832, 1216),
    )
    swarm = {
        "sui_image_params": {
            **{"prompt": "a red apple", "negativeprompt": "", "seed": 1, "steps": 20},
            **{"cfgscale": 7, "model": "sdxl", "width": 8, "height": 8, "sampler": "euler"},
            "loras": ["fruit"],
        }
    }
    assert read(tmp_path, parameters=json.dumps(swarm)) == Generation(
        *("SwarmUI", "a red apple", "", 1, 20, 7.0, "euler", "sdxl", None, (8, 8), ("fruit",))
    )
    fooocus = {
        **{"prompt": "a red apple", "negative_prompt": "", "seed": "5", "steps": 30},
        **{"guidance_scale": 4, "sampler": "dpmpp_2m_sde_gpu", "scheduler": "karras"},
        **{"base_model": "juggernaut", "base_model_hash": "aeb7", "resolution": "(1152, 896)"},
    }
    assert read(tmp_path, parameters=json.dumps(fooocus), fooocus_scheme="fooocus") == Generation(
        *("Fooocus", "a red apple", "", 5, 30, 4.0, "dpmpp_2m_sde_gpu karras"),
        *("juggernaut", "aeb7", (1152, 896)),
    )
    easy = {"prompt": "a red apple", "seed": "5", "num_inference_steps": "25"}
    found = read(tmp_path, **easy, guidance_scale="7.5", use_stable_diffusion_model="sd15")
    assert found == Generation(
        "Easy Diffusion", "a red apple", None, 5, 25, 7.5, None, "sd15", None, None
    )
    found = read(tmp_path, metadata=json.dumps({**easy, "model_id": "hub/sd15"}))
    assert (found.program, found.model, found.steps) == ("diffusers", "hub/sd15", 25)


HOSTILE = {
    "brackets": "[" * 1_000_000,
    "objects": '{"a":' * 1_000_000,
    "digits": '{"seed": ' + "9" * 100_000 + "}",
    "half a character": '{"prompt": "\\ud83d", "seed": 1, "steps": 1}',
    "list": "[1, 2]",
    "null": '{"image": null, "prompt": null, "sui_image_params": 3, "nodes": {}, "links": 5}',
    "numbers": json.dumps({str(key): key for key in range(10_000)}),
    "broken": '{"prompt": "a',
    "nodes": '{"nodes": [1, {"id": {}, "type": [], "inputs": [3, {"link": 1}]}], "links": [[1]]}',
    "classes": '{"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0], "seed": ["3", 9]}}}',
    "commas": "Steps: " + "a" * 1_000_000 + "," * 1_000_000,
    "keys": "Steps: 1, " + "Aa " * 500_000,
    "quotes": 'Steps: 1, A: "' + "\\" * 1_000_001,
    "dream": '"' + '" -a b' * 500_000,
    "infinite": '{"seed": Infinity, "steps": NaN, "guidance_scale": -Infinity, "prompt": "x"}',
}
PLACES = (
    *("parameters", "prompt", "workflow", "invokeai_metadata", "sd__metadata", "Dream"),
    *("Comment", "metadata", "UserComment"),
)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_texts_give_notes_and_no_traceback_nor_a_long_wait(text, tmp_path):
    start = time.process_time()
    for place in PLACES:
        found = read(tmp_path, **{place: text}, Software="NovelAI", fooocus_scheme="fooocus")
        "\n".join(found.describe()).encode()
        assert all(line.isprintable() for line in found.describe())
        assert found.seed in (None, 1) and found.guidance is None
    assert time.process_time() - start < 20


def test_absurdly_long_texts_are_not_read_and_commands_to_a_terminal_are_escaped(tmp_path):
    found = read(tmp_path, parameters="x" * (9 << 20))
    assert found.notes[0] == "parameters: 9 million characters, so not read"
    found = read(tmp_path, parameters="\x1b[2Jred\nSteps: 4, Seed: 1")
    assert found.describe()[1] == "prompt: \\x1b[2Jred"


def test_a_text_that_unfolds_without_end_and_a_file_that_is_no_picture_are_refused(tmp_path):
    path = png(tmp_path / "a.png")
    data = b"parameters\0\0" + zlib.compress(b"\0" * (100 << 20), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + data))
    content = path.read_bytes()
    path.write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(UserError, match="cannot be read"):
        read_generation(path)
    (tmp_path / "b.png").write_text("no picture")
    for name in "b.png", "gone.png":
        with pytest.raises(UserError):
            read_generation(tmp_path / name)


def test_a_text_after_the_pixels_is_read(tmp_path):
    path = png(tmp_path / "a.png")
    data = b"parameters\0x\nSteps: 4, Seed: 1"
    chunk = struct.pack(">I", len(data)) + b"tEXt" + data
    chunk += struct.pack(">I", zlib.crc32(b"tEXt" + data))
    content = path.read_bytes()
    path.write_bytes(content[:-12] + chunk + content[-12:])
    assert read_generation(path).prompt == "x"


def test_broken_exif_is_no_reason_to_stop(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert read_generation(tmp_path / "a.jpg").prompt is None


@pytest.mark.parametrize(
    "value, integer, number",
    [
        (str(2**64 - 1), 2**64 - 1, float(2**64 - 1)),
        (2**64, None, float(2**64)),
        (-1, None, -1.0),
        ("7.0", 7, 7.0),
        (7.5, None, 7.5),
        (True, None, None),
        ("1e999", None, None),
        ("٣", 3, 3.0),
        (None, None, None),
    ],
)
def test_numbers_are_taken_only_where_they_are_some(value, integer, number):
    assert (to_integer(value), to_number(value)) == (integer, number)
