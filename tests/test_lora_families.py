"""LoRA of every family: files under the names that trainers publish do what W + scale B A does, their
matrices are unlearned, and a file of another family is refused by name."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import save_file
from test_lora import make_pairs
from tiny_families import RESOLUTION, make_pipeline, make_root

import compute_influence
import compute_training_loss
import unlearn
from unlearn.attribution.curvature import per_sample_gradients
from unlearn.attribution.estimation import draw_samples
from unlearn.attribution.losses import sample_losses
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.commands import attribute, examination, fisher, machine, retrain
from unlearn.datasets.conditioning import map_tensors
from unlearn.errors import UserError
from unlearn.models import pipelines
from unlearn.models.families import find_family
from unlearn.models.lora import fuse
from unlearn.models.lora_files import read_lora
from unlearn.models.lora_headers import compare_header, parse_header
from unlearn.models.lora_layers import hash_lora, place
from unlearn.models.lora_names import parse_name
from unlearn.models.pipelines import load_model, select_parameters, tracked
from unlearn.storage.reading import read_tensors

FAMILIES = ["sdxl", "sd3", "sd3-medium35", "flux", "pixart", "qwen", "klein"]
FAMILIES += ["zimage", "sana", "lumina2"]
CLIP_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
T5_LAYERS = ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"]
QWEN_LAYERS = [
    f"model.language_model.layers.{name}" for name in ("0.self_attn.q_proj", "1.mlp.up_proj")
]
KOHYA_ENCODERS = {  # by family: kohya's word for each text encoder
    "sdxl": {"text_encoder": "te1", "text_encoder_2": "te2"},
    "sd3": {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3"},
    "flux": {"text_encoder": "te1", "text_encoder_2": "te3"},
    "pixart": {"text_encoder": "te"},
    "qwen": {"text_encoder": "te"},
    "klein": {"text_encoder": "te"},
    "zimage": {"text_encoder": "te"},
    "sana": {"text_encoder": "te"},
    "lumina2": {"text_encoder": "te"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """(name of the family, its tiny pipeline, its Family)."""
    pipeline = make_pipeline(request.param)
    return request.param.partition("-")[0], pipeline, family_of(pipeline)


def family_of(pipeline):
    """Its Family."""
    return find_family(type(pipeline).__name__, pipeline.components)


def denoiser_of(pipeline):
    """Its UNet or transformer."""
    return getattr(pipeline, "unet", None) or pipeline.transformer


def all_layers(module):
    """Names of every layer that a LoRA can change."""
    kinds = torch.nn.Linear, torch.nn.Conv2d
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1
    ]


def one_of_each(denoiser):
    """The first layer of every kind: layers whose names differ in the numbers of blocks alone are of
    one."""
    kinds = {}
    for name in all_layers(denoiser):
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "", name), name)
    return list(kinds.values())


def encoder_layers(encoder):
    """Some layers of a text encoder."""
    names = dict(encoder.named_modules())
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    of_clip = [f"{prefix}{name}" for name in CLIP_LAYERS]
    of_qwen = [name.replace("language_model.", "") for name in QWEN_LAYERS]
    alone = [name.removeprefix("model.") for name in of_qwen]
    kinds = of_clip, T5_LAYERS, QWEN_LAYERS, of_qwen, alone
    return next(own for own in kinds if own[0] in names)


def underscored(prefix, pairs, alpha):
    """Tensors under names whose dots are underscores, kohya's and OneTrainer's."""
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = f"{prefix}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(prefix, pairs):
    """Tensors under PEFT's names."""
    return {
        f"{prefix}.{layer}.lora_{letter}.weight": tensor.clone()
        for layer, pair in pairs.items()
        for letter, tensor in zip("AB", pair)
    }


def bare(layer):
    """A text encoder's layer by the name that kohya gives it."""
    own = ("text_model.", "encoder.block", "layers.")
    return layer if layer.startswith(own) else f"text_model.{layer}"


def write_form(form, path, name, pairs):
    """Writes pairs, by part and layer, in one form; returns the scale that they have there."""
    denoiser, *encoders = pairs
    if form == "kohya":
        tensors = underscored("lora_unet", pairs[denoiser], 3.0)
        for part in encoders:
            own = {bare(layer): pair for layer, pair in pairs[part].items()}
            tensors |= underscored(f"lora_{KOHYA_ENCODERS[name][part]}", own, 3.0)
    elif form == "OneTrainer":
        tensors = underscored(f"lora_{denoiser}", pairs[denoiser], 3.0)
    elif form == "ComfyUI":
        tensors = dotted("diffusion_model", pairs[denoiser])
    else:
        tensors = {}
        for part in pairs:
            tensors |= dotted("base_model.model" if form == "PEFT" else part, pairs[part])
    settings = {f"{part}.lora_alpha": 3 for part in pairs}
    header = {"lora_adapter_metadata": json.dumps(settings)} if form == "diffusers" else {}
    save_file(tensors, path, header)
    if form == "PEFT":
        path.with_name("adapter_config.json").write_text('{"lora_alpha": 3}')
    return 1.0 if form == "ComfyUI" else 1.5


FORMS = ["kohya", "OneTrainer", "diffusers", "ComfyUI", "PEFT"]


def fused(pipeline, family, path, weight=1.0):
    """Weights of a pipeline's parts with a LoRA file fused into them, {part: {name: tensor}}."""
    changed = {}
    for part, pairs in place(read_lora(parse_name(str(path))), pipeline, family).items():
        module = copy.deepcopy(getattr(pipeline, part))
        fuse(module, pairs, weight)
        changed[part] = module.state_dict()
    return changed


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_of_every_layer_gives_w_plus_scale_b_a(tiny, form, tmp_path):
    name, pipeline, family = tiny
    denoiser = denoiser_of(pipeline)
    pairs = {family.denoiser: make_pairs(denoiser, all_layers(denoiser))}
    if form in ("kohya", "diffusers"):
        for part in family.encoders:
            encoder = getattr(pipeline, part)
            pairs[part] = make_pairs(encoder, encoder_layers(encoder), seed=1)
    scale = write_form(form, tmp_path / "x.safetensors", name, pairs)
    found = fused(pipeline, family, tmp_path / "x.safetensors", 0.7)
    for part, layers in pairs.items():
        weights = getattr(pipeline, part).state_dict()
        for layer, (down, up) in layers.items():
            weight = weights[f"{layer}.weight"].double()
            product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
            expected = weight + 0.7 * scale * product
            weights[f"{layer}.weight"] = expected.float()
            assert (expected - weight).abs().max() > 1e-4
        for key, value in weights.items():
            torch.testing.assert_close(found[part][key], value, rtol=1e-6, atol=1e-7, msg=key)


class Checkpoint(dict):
    """Weights under their original names, which has zeros under all others."""

    def pop(self, key, *default):
        return super().pop(key, torch.zeros(3 * 3072 + 12288))


CONVERTERS = {
    "sdxl": lambda weights, config: single_file_utils.convert_ldm_unet_checkpoint(weights, config),
    "sd3": lambda weights, config: (
        single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    ),
    "flux": lambda weights, config: (
        single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(weights)
    ),
    "klein": lambda weights, config: (
        single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(weights)
    ),
    "zimage": lambda weights, config: (
        single_file_utils.convert_z_image_transformer_checkpoint_to_diffusers(weights)
    ),
    "sana": lambda weights, config: single_file_utils.convert_sana_transformer_to_diffusers(
        weights
    ),
    "lumina2": lambda weights, config: single_file_utils.convert_lumina2_to_diffusers(weights),
}


def test_layers_by_their_authors_names_are_those_that_diffusers_converts(tiny):
    """Each layer's weight is its number, in two halves; diffusers' converter of checkpoints must put
    the same numbers under the names that ours gives."""
    name, pipeline, family = tiny
    if name == "qwen":  # whose authors' names are diffusers'
        assert not family.originals(pipeline.transformer)
        return
    if name == "pixart":
        pytest.skip(
            "diffusers has no converter of it; tests/test_transformer_files.py proves the names"
        )
    denoiser = denoiser_of(pipeline)
    originals, there = family.originals(denoiser), set(all_layers(denoiser))
    if name == "flux":  # XLabs' names are none of the checkpoint's
        originals = {key: own for key, own in originals.items() if ".processor." not in key}
    originals = {key: own for key, own in originals.items() if there.issuperset(own.layers)}
    numbers, weights = {layer: number for number, layer in enumerate(sorted(there))}, Checkpoint()
    for key, original in originals.items():
        rows = [3072] * 3 + [12288] if key.endswith("linear1") else [2] * len(original.layers)
        rows = [2304, 768, 768] if name == "lumina2" and key.endswith("qkv") else rows
        halves = [
            torch.full((count // 2, 1), numbers[layer] + half)
            for layer, count in zip(original.layers, rows)
            for half in ((0.5, 0.0) if original.is_swapped else (0.0, 0.5))
        ]
        weights[f"{key}.weight"] = torch.cat(halves)
    weights.setdefault("context_embedder.weight", torch.zeros(2, 1))
    if name == "sdxl":  # its converter asks for more of what is there
        weights |= {f"{key}.bias": torch.zeros(2) for key in (*originals, "out.0")}
        weights["out.0.weight"] = torch.zeros(2)
        weights = Checkpoint(
            {f"model.diffusion_model.{key}": value for key, value in weights.items()}
        )
    converted = CONVERTERS[name](weights, denoiser.config)
    named = {layer for original in originals.values() for layer in original.layers}
    assert named >= there - {"context_embedder"}, "every layer has an original name"
    for layer in named:
        found = converted[f"{layer}.weight"].flatten()
        first, second = found.chunk(2)
        assert (first == numbers[layer]).all() and (second == numbers[layer] + 0.5).all(), layer


def joined(pairs, original):
    """The one pair of a fused layer, of those of its parts that all have the first one's A."""
    down = pairs[original.layers[0]][0]
    up = torch.cat([pairs[layer][1] for layer in original.layers])
    return down, torch.cat(up.chunk(2)[::-1]) if original.is_swapped else up


@pytest.mark.parametrize("apart", [False, True], ids=["one A", "trained apart"])
def test_kohyas_fused_layers_are_split(tiny, apart, tmp_path):
    name, pipeline, family = tiny
    denoiser = denoiser_of(pipeline)
    originals = family.originals(denoiser)
    if name == "flux":
        originals = {key: own for key, own in originals.items() if ".processor." not in key}
    there = set(all_layers(denoiser))
    originals = {key: own for key, own in originals.items() if there.issuperset(own.layers)}
    if not originals:
        assert name in ("pixart", "qwen")
        return
    separate = make_pairs(denoiser, [layer for own in originals.values() for layer in own.layers])
    written = {}
    for key, own in originals.items():
        if apart and len(own.layers) > 1:  # kohya's split_qkv: one LoRA each, blocks of one B
            downs, ups = zip(*(separate[layer] for layer in own.layers))
            written[key] = torch.cat(downs), torch.block_diag(*ups)
        else:
            for layer in own.layers:
                separate[layer] = separate[own.layers[0]][0], separate[layer][1]
            written[key] = joined(separate, own)
    save_file(
        {key: value.contiguous() for key, value in underscored("lora_unet", written, 2.0).items()},
        tmp_path / "kohya.safetensors",
    )
    placed = place(read_lora(parse_name(str(tmp_path / "kohya.safetensors"))), pipeline, family)
    found = placed[family.denoiser]
    assert found.keys() == separate.keys()
    for layer, (down, up) in separate.items():
        assert torch.equal(found[layer].down, down) and torch.equal(found[layer].up, up), layer


FLUX_QKV = "double_blocks.0.img_attn.qkv"


def test_a_pair_of_fused_layers_that_is_too_wide_is_refused_by_its_own_name(tmp_path):
    pipeline = make_pipeline("flux")
    pairs = {FLUX_QKV: (torch.ones(2, 16), torch.ones(50, 2))}
    save_file(underscored("lora_unet", pairs, 2.0), tmp_path / "x.safetensors")
    with pytest.raises(
        UserError, match=r"img_attn_qkv of the transformer: its change is \[50, 16\].*\[48, 16\]"
    ):
        fused(pipeline, family_of(pipeline), tmp_path / "x.safetensors")


def test_xlabs_names_mean_the_attention_of_flux(tmp_path):
    pipeline = make_pipeline("flux")
    family, transformer = family_of(pipeline), pipeline.transformer
    names = {
        "double_blocks.1.processor.qkv_lora1": ["to_q", "to_k", "to_v"],
        "double_blocks.1.processor.proj_lora1": ["to_out.0"],
        "double_blocks.1.processor.qkv_lora2": ["add_q_proj", "add_k_proj", "add_v_proj"],
        "double_blocks.1.processor.proj_lora2": ["to_add_out"],
        "single_blocks.0.processor.qkv_lora": ["to_q", "to_k", "to_v"],
        "single_blocks.0.processor.proj_lora": ["proj_out"],
    }
    tensors, expected = {}, {}
    for number, (name, layers) in enumerate(names.items()):
        block = "transformer_blocks.1" if "double" in name else "single_transformer_blocks.0"
        paths = [f"{block}.attn.{layer}" for layer in layers]
        if layers == ["proj_out"]:
            paths = [f"{block}.proj_out"]
        pairs = make_pairs(transformer, paths, seed=number)
        down, ups = pairs[paths[0]][0], [pairs[path][1] for path in paths]
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": torch.cat(ups)}
        expected |= {path: (down, up) for path, up in zip(paths, ups)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = place(read_lora(parse_name(str(tmp_path / "x.safetensors"))), pipeline, family)
    pairs = found["transformer"]
    assert pairs.keys() == expected.keys()
    for path, (down, up) in expected.items():
        assert torch.equal(pairs[path].down, down) and torch.equal(pairs[path].up, up)
        assert pairs[path].scale == 1


def test_blocks_without_a_word_before_them_are_the_transformer_s(tmp_path):
    """As in the LoRA of few steps that Qwen-Image is published with."""
    pipeline = make_pipeline("qwen")
    layers = [name for name in all_layers(pipeline.transformer) if name.startswith("transformer_")]
    pairs, tensors = make_pairs(pipeline.transformer, layers), {}
    for layer, (down, up) in pairs.items():
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        tensors[f"{layer}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "x.safetensors")
    lora = read_lora(parse_name(str(tmp_path / "x.safetensors")))
    placed = place(lora, pipeline, family_of(pipeline))["transformer"]
    assert placed.keys() == pairs.keys()
    for layer, (down, up) in pairs.items():
        assert torch.equal(placed[layer].down, down) and torch.equal(placed[layer].up, up)
        assert placed[layer].scale == 1.5


def test_names_without_a_part_mean_the_transformer_of_one_stream(tmp_path):
    """DiffSynth's; only where they begin as its layers do."""
    pipeline = make_pipeline("zimage")
    transformer, path = pipeline.transformer, tmp_path / "x.safetensors"
    layers = ["layers.1.attention.to_q", "context_refiner.0.feed_forward.w2"]
    pairs = make_pairs(transformer, layers)
    save_file(
        {
            f"{layer}.lora_{letter}.default.weight": tensor.clone()
            for layer, pair in pairs.items()
            for letter, tensor in zip("AB", pair)
        },
        path,
    )
    found = place(read_lora(parse_name(str(path))), pipeline, family_of(pipeline))["transformer"]
    assert found.keys() == pairs.keys()
    for layer, (down, up) in pairs.items():
        assert torch.equal(found[layer].down, down) and torch.equal(found[layer].up, up)
    save_file({f"blocks.0.to_q.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}, path)
    with pytest.raises(UserError, match="blocks.0.to_q.lora_A.weight: is not how a LoRA names"):
        read_lora(parse_name(str(path)))


STRANGERS = {  # names of one family's LoRA, and what is said of it to a model of another
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "LoRA of Stable Diffusion 1",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": "LoRA of Stable Diffusion XL",
    "lora_unet_double_blocks_0_img_attn_qkv": "LoRA of FLUX.1",
    "transformer.single_transformer_blocks.0.attn.to_k": "LoRA of FLUX.1",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "LoRA of Stable Diffusion 3",
    "lora_unet_layers_0_attention_qkv": "LoRA of Z-Image or Lumina2",
    "diffusion_model.context_refiner.0.attention.to_q": "LoRA of Z-Image or Lumina2",
    "lora_transformer_transformer_blocks_0_attn2_to_k": "a model with a transformer|another model",
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": "LoRA of Stable Diffusion 3",
    "transformer_blocks.0.img_mlp.net.2": "LoRA of Qwen-Image",
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": "LoRA of FLUX.2-dev",
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_lora_of_another_family_is_refused_by_its_name(tiny, stranger, tmp_path):
    _, pipeline, family = tiny
    kinds = ("lora_A", "lora_B") if "." in stranger else ("lora_down", "lora_up")
    tensors = {f"{stranger}.{kind}.weight": torch.ones(2, 2) for kind in kinds}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        place(read_lora(parse_name(str(path))), pipeline, family)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said
    whose = re.search(STRANGERS[stranger], said)
    # Where the layer is there by chance, as in models of one family, its shape tells.
    assert whose or family.name in STRANGERS[stranger] or "another base" in said, said


def test_the_same_lora_has_one_identity_in_every_form(tiny, tmp_path):
    name, pipeline, family = tiny
    denoiser = denoiser_of(pipeline)
    pairs, hashes = {family.denoiser: make_pairs(denoiser, one_of_each(denoiser))}, set()
    for form in ("kohya", "OneTrainer", "diffusers", "PEFT"):
        (tmp_path / form).mkdir()
        write_form(form, tmp_path / form / "x.safetensors", name, pairs)
        lora = read_lora(parse_name(str(tmp_path / form)))
        hashes.add(hash_lora(place(lora, pipeline, family)))
    assert len(hashes) == 1


def test_an_adapter_that_does_not_say_its_part_changes_the_one_that_has_its_layers(tmp_path):
    pipeline = make_pipeline("sdxl")
    family = family_of(pipeline)
    pairs = make_pairs(pipeline.text_encoder_2, ["text_projection"])
    save_file(dotted("base_model.model", pairs), tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    placed = place(read_lora(parse_name(str(tmp_path))), pipeline, family)
    assert list(placed["text_encoder_2"]) == ["text_projection"] and not placed["unet"]
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2, "use_dora": true}')
    with pytest.raises(UserError, match="adapter_config.json says use_dora"):
        read_lora(parse_name(str(tmp_path)))


def test_t5_of_a_pipeline_without_it_is_refused_by_name(tmp_path):
    pipeline = make_pipeline("sd3-without-t5")
    tensors = {
        f"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_{kind}.weight": torch.ones(2, 2)
        for kind in ("down", "up")
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="changes text_encoder_3, which this model lacks"):
        fused(pipeline, family_of(pipeline), tmp_path / "x.safetensors")


# --- models with their matrices beside the weights


class World:
    """A family's tiny pipeline in a folder, a LoRA of every kind of layer in a file, and a data root
    whose model is both."""

    def __init__(self, name, folder):
        self.name, self.pipeline = name, make_pipeline(name)
        self.family = family_of(self.pipeline)
        self.folder, self.file = folder / "pipeline", folder / "lora.safetensors"
        self.pipeline.save_pretrained(self.folder)
        denoiser = denoiser_of(self.pipeline)
        self.layers = one_of_each(denoiser)
        pairs = {self.family.denoiser: make_pairs(denoiser, self.layers)}
        if name == "sd3":  # as every LoRA of it has it: nothing reads these queries
            own = make_pairs(denoiser, ["transformer_blocks.1.attn.add_q_proj"])
            pairs[self.family.denoiser] |= {key: (down, 0 * up) for key, (down, up) in own.items()}
        for part in self.family.encoders:
            encoder = getattr(self.pipeline, part)
            pairs[part] = make_pairs(encoder, encoder_layers(encoder), seed=1)
        write_form("diffusers", self.file, name, pairs)
        self.root = make_root(folder / "root", self.folder, lora=[f"{self.file}:0.8"])
        self.model = load_model(self.folder, "cpu", lora=[f"{self.file}:0.8"])

    def samples(self, model):
        """Three images' samples: latents, noise, timesteps, conditioning."""
        images = unlearn.open_training_set(self.root, model)
        return draw_samples(images, [0, 1, 2], model.num_train_timesteps, seed=0)


NEWER = "zimage", "sana", "lumina2"
WORLDS = ["sdxl", "sd3", "flux", "pixart"]
WORLDS += [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "klein", *NEWER)]


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


def test_matrices_beside_the_weights_predict_what_fused_ones_do(world):
    alone = load_model(world.folder, "cpu", lora=[f"{world.file}:0.8"], fuse_lora=True)
    assert alone.identity == world.model.identity
    samples = world.samples(world.model)
    with torch.no_grad():
        found, expected = (sample_losses(model, *samples) for model in (world.model, alone))
        plain = sample_losses(load_model(world.folder, "cpu"), *samples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert ((found - plain).abs() > 1e-5 * plain).all()
    texts = world.model.encode_prompts(["a dog"])
    for name, text in alone.encode_prompts(["a dog"]).items():
        torch.testing.assert_close(texts[name], text, rtol=0, atol=0)


def test_beside_weights_in_bfloat16_matrices_stay_float32_and_predict_nearly_the_same(world):
    half = load_model(world.folder, "cpu", lora=[f"{world.file}:0.8"], weights="bf16")
    matrices = select_parameters(half.denoiser, "lora")
    assert {value.dtype for value in matrices.values()} == {torch.float32}
    samples = world.samples(world.model)
    with torch.no_grad():
        losses, exact = (sample_losses(model, *samples) for model in (half, world.model))
    torch.testing.assert_close(losses, exact, rtol=0.2, atol=0)
    shape = half.latent_shape(RESOLUTION)
    settings = RemovalSettings("lora", timesteps=(350,), probes=1, sketch_size=64)
    images = unlearn.open_training_set(world.root, half)
    assert np.isfinite(FeatureMaker(half, shape, settings).make(images, [0])).all()


def test_gradients_of_all_matrices_equal_autograd_of_each_sample(world):
    samples, model = world.samples(world.model), world.model
    parameters = select_parameters(model.denoiser, "lora")
    assert len(parameters) == 2 * len(world.layers)
    with tracked(parameters):
        found = dict(per_sample_gradients(model, parameters, samples))
        for row in range(3):
            one = map_tensors(lambda tensor: tensor[row : row + 1], samples)
            loss = sample_losses(model, *one).sum()
            expected = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, expected):
                gradient = torch.zeros_like(found[name][row]) if gradient is None else gradient
                scale = max(float(gradient.abs().max()), 1e-12)
                torch.testing.assert_close(
                    found[name][row], gradient, rtol=1e-3, atol=1e-4 * scale, msg=name
                )


RUN = ["--loss_time_samples", "2", "--unlearn_batch_size", "4", "--unlearn_grad_accum_steps", "2"]


def test_a_lora_of_another_family_is_refused_before_weights_are_read(world, tmp_path, monkeypatch):
    part = {"unet": "transformer", "transformer": "unet"}[world.family.denoiser]
    tensors = dotted(part, {"x": (torch.ones(2, 2), torch.ones(2, 2))})
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(pipelines.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(UserError, match=f"the model is of {world.family.name}"):
        load_model(world.folder, "cpu", lora=[str(tmp_path / "x.safetensors")])


def test_doctor_tells_a_lora_of_another_family_by_the_file_alone(world, tmp_path):
    own, _ = examination.examine_lora(str(world.file), world.family)[:2]
    assert own == machine.OK
    tensors = dotted(
        "unet" if world.name != "sdxl" else "transformer", {"x": (torch.ones(2, 2),) * 2}
    )
    save_file(tensors, tmp_path / "x.safetensors")
    found = examination.examine_lora(str(tmp_path / "x.safetensors"), world.family)
    assert found.status == machine.PROBLEM and "the model is of" in found.text


def test_the_header_s_guidance_and_clip_skip_are_compared_where_the_model_has_them(world):
    header = parse_header({"ss_guidance_scale": "1.0", "ss_clip_skip": "2"})
    notes = compare_header(header, [["x"]], model=world.model)
    assert [note for note in notes if "clip skip" in note] == []
    said = "trained with a guidance of 1 by its header, here the model is told 3.5"
    assert [said in note for note in notes] == ([True] if world.name == "flux" else [])
    assert compare_header(parse_header({"ss_guidance_scale": "3.5"}), [], model=world.model) == []


def test_both_scripts_unlearn_a_loras_matrices_and_score(world, tmp_path):
    flags = ["--dataroot", str(world.root), "--device", "cpu"]
    tasks = [*flags, "--task_json", str(world.root / "tasks.json"), "--result_dir", str(tmp_path)]
    fisher.main([*flags, "--num_samples", "16"])
    compute_training_loss.main([*tasks, "--time_samples", "2"])
    compute_influence.main([*tasks, *RUN])
    folder = tmp_path / "influence/query.png"
    found = np.load(folder / "influence.npz")["influence"]
    assert len(found) == 4 and np.isfinite(found).all() and found.std() > 0
    change = read_tensors(folder / "weight_change.safetensors")
    assert change.keys() == select_parameters(world.model.denoiser, "lora").keys()
    record = json.loads((folder / "weight_change.json").read_text())["identity"]
    assert record["weight_selection"] == "lora" and record["lora"][0][1] == 0.8


@pytest.mark.parametrize("world", ["sdxl"], indirect=True)
def test_one_command_attributes_a_picture_to_the_images_of_a_lora(world, tmp_path):
    """Its matrices are random: no order is expected."""
    images = shutil.copytree(world.root / "laion_subset/images", tmp_path / "images")
    [answer] = unlearn.attribute(
        world.root / "synth/query.png",
        model=world.folder,
        lora=f"{world.file}:0.8",
        images=images,
        caption="a red square",
        prompt="a red square",
        out=tmp_path / "out",
        device="cpu",
    )
    assert len(answer.scores) == 4 and answer.scores.std() > 0
    settings = json.loads((tmp_path / "out/root/dataset.json").read_text())
    assert settings["lora"] == [f"{world.file}:0.8"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("world", ["flux"], indirect=True)
def test_the_command_attributes_a_picture_to_the_images_of_a_lora_of_flux(
    world, weights, tmp_path, capsys
):
    """As people have it: the transformer's file and the folder of the rest; the picture is a training
    image made a little darker. Run again it takes what is there."""
    transformer = shutil.copy(
        world.folder / "transformer/diffusion_pytorch_model.safetensors",
        tmp_path / "mine.safetensors",
    )
    images = shutil.copytree(world.root / "laion_subset/images", tmp_path / "images")
    Image.open(images / "0000.png").point(lambda value: value * 0.9).save(tmp_path / "query.png")
    words = ["--model", str(transformer), "--base", str(world.folder), "--weights", weights]
    words += ["--lora", f"{world.file}:0.8", "--images", str(images), "--caption", "a red square"]
    words += ["--prompt", "a red square", "--out", str(tmp_path / "out"), "--device", "cpu"]
    tables = []
    for _ in range(2):
        attribute.main([str(tmp_path / "query.png"), *words])
        tables.append([line for line in capsys.readouterr().out.splitlines() if ".png" in line])
    assert tables[0] == tables[1] and len(tables[0]) >= 4
    [folder] = (tmp_path / "out/results/influence").rglob("influence.npz")
    found = np.load(folder)["influence"]
    assert len(found) == 4 and found.argmax() == 0 and found.std() > 0
    settings = json.loads((tmp_path / "out/root/dataset.json").read_text())
    assert settings["lora"] == [f"{world.file}:0.8"]
    assert settings.get("weights", "fp32") == weights
    assert (folder.parent / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("world", ["sdxl", "flux"], indirect=True)
def test_a_lora_is_trained_without_each_image_and_its_queries_measured(world, tmp_path):
    flags = ["--dataroot", str(world.root), "--device", "cpu", "--result_dir", str(tmp_path)]
    flags += ["--train_lora_rank", "2", "--train_epochs", "2", "--train_batch_size", "2"]
    flags += ["--train_lr", "1e-2", "--task_json", str(world.root / "tasks.json")]
    flags += ["--no_pictures", "--loss_time_samples", "10"]
    retrain.main(["full", *flags])
    retrain.main(["each", *flags])
    retrain.main(["subsets", "--count", "2", "--stack", "2", *flags])
    losses = [
        json.loads(path.read_text())["losses"] for path in (tmp_path / "retrained").glob("*.json")
    ]
    assert len(losses) == 1 + 4 + 2
    assert len({value for each in losses for value in each.values()}) == len(losses)
    trained = tmp_path / "retrain/full-seed0/model.safetensors"
    load_model(world.folder, "cpu", lora=[str(trained)])
