"""Builds the embedded emoji world, data/emoji, from the Noto colour emoji font. Everything is
seeded and resumable.

    apt-get install fonts-noto-color-emoji unicode-data
    pip install -e .[emoji]
    python data/build_emoji.py                       # about two hours on two cores; users never need to run it

Stages: images and captions -> VAE -> base text-to-image model -> customized models and their
queries -> test cases and tasks. The diagonal Fisher comes after it: python -m unlearn fisher
--dataroot data/emoji --num_samples 30000
"""

import argparse
import copy
import json
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from emoji_builder import autoencoder, base, customize, families
from emoji_builder.glyphs import read_emoji_names, render_emoji, save_small_png
from PIL import Image, ImageDraw, ImageFont

from unlearn.datasets.captions import list_folder, read_lines

HOME = Path(__file__).parent / "emoji"
BUILD = HOME / ".build"
CONTACT_SHEET_PROMPTS = (
    "grinning face",
    "crying face",
    "face with monocle",
    "red apple",
    "strawberry",
    "pizza",
    "birthday cake",
    "hot beverage",
    "dog face",
    "panda",
    "tropical fish",
    "butterfly",
    "octopus",
    "sunflower",
    "maple leaf",
    "cactus",
    "rocket",
    "sailboat",
    "police car",
    "bicycle",
    "balloon",
    "house with garden",
    "rainbow",
    "sun with face",
    "alarm clock",
    "guitar",
    "soccer ball",
    "umbrella",
    "key",
    "red square",
    "blue circle",
    "star",
)
PICTURE_SIZE, RESOLUTION, NUM_STYLE_EXEMPLARS = 64, 32, 8


def write_images(font, emoji_test):
    """Writes the base training set and the exemplars of every family and style."""
    drawn = render_emoji(font, read_emoji_names(emoji_test), PICTURE_SIZE)
    base_set = [(emoji, image) for emoji, image in drawn if not families.is_held_out(emoji.caption)]
    folder = HOME / "laion_subset/images"
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, image) in enumerate(base_set):
        save_small_png(image, folder / f"{number:06d}.png")
    for family, (_, pattern) in families.EXEMPLARS.items():
        write_exemplars(
            f"object/{family}",
            [image for emoji, image in drawn if re.search(pattern, emoji.caption)],
        )
    for number, (style, treat) in enumerate(families.STYLES.items()):
        chosen = np.random.default_rng(number).choice(
            len(base_set), NUM_STYLE_EXEMPLARS, replace=False
        )
        write_exemplars(f"style/{style}", [treat(base_set[index][1]) for index in chosen])
    # Last: where it stands, this stage is complete.
    (HOME / "laion_subset/captions.txt").write_text(
        "".join(f"{emoji.caption}\n" for emoji, _ in base_set), encoding="utf-8"
    )


def write_exemplars(name, images):
    """Writes the exemplars of one customized model."""
    folder = HOME / "exemplar" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        save_small_png(image.convert("RGB"), folder / f"{number}.png")


def read_pixels(paths):
    """Pixels [n, 3, 32, 32] float32 in [-1, 1]."""
    images = [
        np.asarray(
            Image.open(path).convert("RGB").resize((RESOLUTION, RESOLUTION), Image.BILINEAR),
            np.float32,
        )
        for path in paths
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def encode_views(vae, pixels):
    """Scaled latents [2, n, 4, 8, 8]: as is and mirrored."""
    views = [
        torch.cat([vae.encode(batch).latent_dist.mean for batch in view.split(100)])
        for view in (pixels, pixels.flip(-1))
    ]
    return torch.stack(views) * vae.config.scaling_factor


def build_pipeline():
    """Trains and saves the base pipeline, half precision, or loads it. Returns (pipeline, latents,
    captions)."""
    pixels = read_pixels(list_folder(HOME / "laion_subset/images"))
    captions = read_lines(HOME / "laion_subset/captions.txt")
    folder = HOME / "pipeline"
    if not (folder / "model_index.json").exists():
        vae = autoencoder.train_autoencoder(pixels, BUILD / "vae.pt")
        autoencoder.centre_latents(vae, pixels)
        parts = base.train_base(encode_views(vae, pixels), captions, BUILD / "base.pt")
        pipeline = base.make_pipeline(vae, *parts).to(dtype=torch.float16)
        pipeline.save_pretrained(BUILD / "pipeline", safe_serialization=True)
        # transformers loads a model in the type that its configuration names, diffusers in float32:
        # they must agree.
        config = BUILD / "pipeline/text_encoder/config.json"
        write_json(config, {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"})
        (BUILD / "pipeline").rename(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder).to(dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, encode_views(pipeline.vae, pixels), captions


def draw_contact_sheet(pipeline):
    """What stock diffusers makes of some captions, eight a row."""
    prompts = CONTACT_SHEET_PROMPTS
    images = pipeline(
        list(prompts),
        num_inference_steps=50,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    sheet = Image.new("RGB", (8 * 120, len(prompts) // 8 * 132), "white")
    font = ImageFont.load_default(11)
    for number, (prompt, image) in enumerate(zip(prompts, images)):
        left, top = number % 8 * 120 + 12, number // 8 * 132 + 8
        sheet.paste(image.resize((96, 96), Image.BICUBIC), (left, top))
        ImageDraw.Draw(sheet).text((left + 48, top + 100), prompt, "black", font, anchor="ma")
    sheet.save(HOME / "contact_sheet.png", optimize=True)


def list_models():
    """The customized models: (kind, name, train prompt, category, prompts of its queries); two
    queries for those that only choose hyperparameters."""
    for family in (*families.REPORTED_OBJECTS, *families.TUNING_OBJECTS):
        category = families.EXEMPLARS[family][0]
        prompts = [
            template.format("<new1>", category=category) for template in families.OBJECT_PROMPTS
        ]
        yield (
            "object",
            family,
            f"<new1> {category}",
            category,
            prompts[: 2 if family in families.TUNING_OBJECTS else None],
        )
    for style in (*families.REPORTED_STYLES, *families.TUNING_STYLES):
        yield (
            "style",
            style,
            families.STYLE_TRAIN_PROMPT,
            None,
            families.STYLE_PROMPTS[: 2 if style in families.TUNING_STYLES else None],
        )


def build_customized(pipeline, latents, captions, seed, kind, name, prompt):
    """Trains a customized model, unless that was done."""
    folder = HOME / "models" / kind / name
    if (folder / "<new1>.bin").exists():
        return
    own = copy.deepcopy(pipeline)
    exemplars = encode_views(own.vae, read_pixels(list_folder(HOME / "exemplar" / kind / name)))
    weights, tokens = customize.train_customized(
        own, exemplars, prompt, latents, captions, seed, f"{kind} {name}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "pytorch_custom_diffusion_weights.pt")
    torch.save(tokens, folder / "<new1>.bin.part")
    (folder / "<new1>.bin.part").rename(folder / "<new1>.bin")


def build_queries(pipeline, seed, kind, name, prompts):
    """Makes the queries of a customized model, unless that was done."""
    folder = HOME / "synth" / kind / "prompts" / name / "samples"
    models = HOME / "models" / kind / name
    if (folder / f"{len(prompts) - 1:05d}.png").exists():
        return
    own = copy.deepcopy(pipeline)
    own.set_progress_bar_config(disable=True)
    customize.load_customized(
        own,
        torch.load(models / "pytorch_custom_diffusion_weights.pt", weights_only=True),
        torch.load(models / "<new1>.bin", weights_only=True),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(customize.make_queries(own, prompts, seed)):
        image.save(folder / f"{number:05d}.png")


def write_tasks():
    """Writes json/test_*.json, path_to_prompts.json and the task files, reported ones and those for
    choosing."""
    reported = {*families.REPORTED_OBJECTS, *families.REPORTED_STYLES}
    cases, tasks, all_prompts = {}, {"reported": [], "tuning": []}, {}
    for kind, name, train_prompt, category, prompts in list_models():
        use = "reported" if name in reported else "tuning"
        test_case = f"test_{kind}" if use == "reported" else f"test_tuning_{kind}"
        entries = cases.setdefault(test_case, [])
        synth = [
            f"synth/{kind}/prompts/{name}/samples/{number:05d}.png"
            for number in range(len(prompts))
        ]
        exemplars = list_folder(HOME / "exemplar" / kind / name)
        entries.append(
            {
                "exemplar": [f"dataset/exemplar/{kind}/{name}/{path.name}" for path in exemplars],
                "synth": {"prompts": [f"dataset/{path}" for path in synth]},
                "class_id": name,
                "category": category,
            }
        )
        all_prompts.update(zip(synth, prompts))
        tasks[use] += [
            {
                "synth_image_path": path,
                "prompt": prompt,
                "test_case": test_case,
                "test_case_ind": len(entries) - 1,
                "model_path": f"models/{kind}/{name}",
                "train_prompt": train_prompt,
                "category": category or "art",
            }
            for path, prompt in zip(synth, prompts)
        ]
    (HOME / "json").mkdir(exist_ok=True)
    for test_case, entries in cases.items():
        write_json(HOME / "json" / f"{test_case}.json", entries)
    write_json(HOME / "path_to_prompts.json", all_prompts)
    for use, entries in tasks.items():
        write_json(HOME.parent.parent / "tasks" / f"emoji_{use}.json", entries)
    write_json(HOME.parent.parent / "tasks" / "emoji_demo.json", tasks["reported"][:1])


def write_json(path, value):
    """Writes a JSON file, indented."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main():
    """Builds what is not there yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    parser.add_argument(
        "--emoji_test",
        default="/usr/share/unicode/emoji/emoji-test.txt",
        help="Unicode's list of emoji and names",
    )
    args = parser.parse_args()
    if not (HOME / "laion_subset/captions.txt").exists():
        write_images(args.font, args.emoji_test)
    pipeline, latents, captions = build_pipeline()
    draw_contact_sheet(pipeline)
    for seed, (kind, name, prompt, _, prompts) in enumerate(list_models(), start=1):
        build_customized(pipeline, latents, captions, seed, kind, name, prompt)
        build_queries(pipeline, seed, kind, name, prompts)
    write_tasks()


if __name__ == "__main__":
    main()
