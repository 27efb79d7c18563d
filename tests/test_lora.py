"""LoRA: files in every form that people have do what W + scale B A does, and nothing of one is left
out in silence."""

import copy
import json

import pytest
import torch
from conftest import PARITY
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from unlearn.errors import UserError
from unlearn.models.lora_files import read_lora
from unlearn.models.lora_names import parse_name
from unlearn.models.pipelines import load_model, select_parameters
from unlearn.storage.hashes import hash_tensors, named_weights

TINY = str(PARITY / "fixture/sd-tiny")
ATTENTION = "mid_block.attentions.0.transformer_blocks.0"
LINEAR = [f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.attn1.to_out.0", f"{ATTENTION}.ff.net.2"]
CONVOLUTIONS = ["mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1"]
TEXT = [
    # all four: diffusers drops the others where out_proj is missing
    *(f"encoder.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    "encoder.layers.1.mlp.fc1",
]


def make_pairs(module, layers, rank=2, seed=0):
    """Random A and B for some layers of a module: {layer: (A, B)}."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        weight = module.get_submodule(layer).weight
        ones = (1, 1) if weight.ndim == 4 else ()
        shapes = (rank, *weight.shape[1:]), (len(weight), rank, *ones)
        pairs[layer] = tuple(
            (0.1 * torch.randn(shape, generator=generator)).half().float() for shape in shapes
        )
    return pairs


def kohya_names(part, pairs, alpha=None):
    """Tensors of a LoRA under kohya's names."""
    prefix = "lora_unet_" if part == "unet" else "lora_te_text_model_"
    tensors = {}
    for layer, (down, up) in pairs.items():
        name = prefix + layer.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft_names(part, pairs):
    """Tensors of a LoRA under the names that diffusers' saver gives them."""
    prefix = "unet." if part == "unet" else "text_encoder.text_model."
    return {
        f"{prefix}{layer}.lora_{letter}.weight": tensor
        for layer, pair in pairs.items()
        for letter, tensor in zip("AB", pair)
    }


def older_names(pairs):
    """Tensors of attention layers under the names of diffusers before PEFT."""
    tensors = {}
    for layer, pair in pairs.items():
        attention, projection = layer.removesuffix(".0").rsplit(".", 1)
        for kind, tensor in zip(("down", "up"), pair):
            tensors[f"unet.{attention}.processor.{projection}_lora.{kind}.weight"] = tensor
    return tensors


@pytest.fixture(scope="module")
def forms(model, tmp_path_factory):
    """LoRA files by form: (path, {part: {layer: (A, B)}}, scale)."""
    folder = tmp_path_factory.mktemp("loras")
    linear = make_pairs(model.denoiser, LINEAR)
    everything = make_pairs(model.denoiser, LINEAR + CONVOLUTIONS, rank=3, seed=1)
    text = make_pairs(model.pipeline.text_encoder, TEXT, rank=2, seed=2)
    attention = make_pairs(model.denoiser, LINEAR[:2], seed=3)
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 6,
        "text_encoder.r": 2,
        "text_encoder.lora_alpha": 6,
    }
    for part, pairs in ("unet", linear), ("text_encoder", text):
        settings[f"{part}.target_modules"] = list(pairs)
    header = {"lora_adapter_metadata": json.dumps(settings)}
    written = {
        "kohya": (kohya_names("unet", linear, alpha=1.0), {}, {"unet": linear}, 0.5),
        "kohya with convolutions and text encoder": (
            kohya_names("unet", everything, alpha=6.0) | kohya_names("text", text, alpha=4.0),
            {"ss_network_dim": "3"},
            {"unet": everything, "text_encoder": text},
            2.0,
        ),
        "peft": (
            {name: value.half() for name, value in peft_names("unet", linear).items()},
            {},
            {"unet": linear},
            1.0,
        ),
        "peft with alphas and text encoder": (
            peft_names("unet", linear) | peft_names("text", text),
            header,
            {"unet": linear, "text_encoder": text},
            3.0,
        ),
        "older diffusers": (older_names(attention), {}, {"unet": attention}, 1.0),
    }
    made = {}
    for number, (form, (tensors, metadata, pairs, scale)) in enumerate(written.items()):
        path = folder / f"{number}.safetensors"
        save_file(tensors, path, metadata)
        made[form] = (path, pairs, scale)
    return made


FORMS = [
    "kohya",
    "kohya with convolutions and text encoder",
    "peft",
    "peft with alphas and text encoder",
    "older diffusers",
]


def predict(model, seed=0):
    """A prediction of a model, and what it makes of a text."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, *model.latent_shape(64), generator=generator)
    tokens = torch.arange(model.embedding_shape[0])[None]
    with torch.no_grad():
        text = model.pipeline.text_encoder(tokens).last_hidden_state
        return model.predict(noisy, torch.tensor([10, 700]), {"embeddings": text}), text


def changed_by_hand(model, pairs, scale):
    """The miniature model with W + scale B A in place of W."""
    changed = copy.deepcopy(model)
    for part, layers in pairs.items():
        for layer, (down, up) in layers.items():
            weight = getattr(changed.pipeline, part).get_submodule(layer).weight
            product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
            weight.data += scale * product.reshape(weight.shape)
    return changed


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_file_gives_the_weights_and_predictions_of_w_plus_scale_b_a(model, forms, form):
    path, pairs, scale = forms[form]
    expected, text = predict(changed_by_hand(model, pairs, 0.7 * scale))
    assert (expected - predict(model)[0]).abs().max() > 1e-3
    for is_fused in (False, True) if "kohya" in form else (False,):
        found = load_model(TINY, "cpu", lora=[f"{path}:0.7"], fuse_lora=is_fused)
        prediction, own_text = predict(found)
        torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own_text, text, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_file_gives_what_diffusers_makes_of_it(forms, form):
    path, _, _ = forms[form]
    pipeline = DiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    ours = load_model(TINY, "cpu", lora=[str(path)])
    expected, text = predict(ours)
    tokens = torch.arange(ours.embedding_shape[0])[None]
    noisy = torch.randn(2, *ours.latent_shape(64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.text_encoder(tokens).last_hidden_state
        found = pipeline.unet(noisy, torch.tensor([10, 700]), theirs.expand(2, -1, -1)).sample
    torch.testing.assert_close(theirs, text, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_several_loras_add_up_each_with_its_weight(model, forms):
    (first, pairs, scale), (second, others, other_scale) = forms["kohya"], forms["older diffusers"]
    loaded = load_model(TINY, "cpu", lora=[f"{first}:0.5", f"{second}:-2"])
    expected = changed_by_hand(model, pairs, 0.5 * scale)
    for layer, (down, up) in others["unet"].items():
        expected.denoiser.get_submodule(layer).weight.data += -2 * other_scale * (up @ down)
    torch.testing.assert_close(predict(loaded)[0], predict(expected)[0], rtol=1e-5, atol=1e-6)


def test_identity_tells_loras_and_their_weights_but_not_forms_of_a_file_apart(
    model, forms, tmp_path
):
    path, pairs, _ = forms["peft"]
    save_file(kohya_names("unet", pairs["unet"]), tmp_path / "same.safetensors")
    identities = [
        load_model(TINY, "cpu", lora=[name]).identity
        for name in (str(path), str(tmp_path / "same.safetensors"), f"{path}:0.5")
    ]
    assert identities[0] == identities[1]
    assert identities[0]["weights"] != identities[2]["weights"]
    assert identities[0]["weights"] != model.identity["weights"]
    assert "lora" not in model.identity
    fused = load_model(TINY, "cpu", lora=[str(path)], fuse_lora=True)
    assert fused.identity == identities[0]


def test_the_selection_lora_holds_the_matrices_and_nothing_else(model, forms):
    path, pairs, _ = forms["kohya with convolutions and text encoder"]
    loaded = load_model(TINY, "cpu", lora=[str(path)])
    selected = select_parameters(loaded.denoiser, "lora")
    assert len(selected) == 2 * len(pairs["unet"])
    assert not any(value.requires_grad for value in loaded.denoiser.parameters())
    with pytest.raises(UserError, match="stands beside these weights"):
        select_parameters(loaded.denoiser, "cross-attn-kv")
    with pytest.raises(UserError, match="has no LoRA"):
        select_parameters(model.denoiser, "lora")
    fused = load_model(TINY, "cpu", lora=[str(path)], fuse_lora=True)
    assert (
        select_parameters(fused.denoiser, "all").keys()
        == dict(model.denoiser.named_parameters()).keys()
    )


def test_one_that_changes_the_text_encoder_alone_has_nothing_to_unlearn(model, tmp_path):
    pairs = make_pairs(model.pipeline.text_encoder, TEXT)
    save_file(peft_names("text", pairs), tmp_path / "text.safetensors")
    loaded = load_model(TINY, "cpu", lora=[str(tmp_path / "text.safetensors")])
    assert (predict(loaded)[1] - predict(model)[1]).abs().max() > 1e-3
    hashes = {hash_tensors(named_weights(each.pipeline.text_encoder)) for each in (model, loaded)}
    assert len(hashes) == 2  # of which embeddings on disk say what they were made by
    with pytest.raises(UserError, match="changes the text encoder alone.*cross-attn-kv"):
        select_parameters(loaded.denoiser, "lora")


def broken(model, change):
    """Tensors of a LoRA with something wrong."""
    tensors = kohya_names("unet", make_pairs(model.denoiser, LINEAR[:1]), alpha=1.0)
    [down] = [key for key in tensors if "down" in key]
    [up] = [key for key in tensors if "lora_up" in key]
    change(tensors, down, up)
    return tensors


def put(key, tensor=None):
    """A change that adds a tensor under a name."""
    return lambda tensors, down, up: tensors.update(
        {key: torch.ones(2) if tensor is None else tensor}
    )


def put_pair(down_key, up_key):
    """A change that adds a pair under two names."""
    return lambda tensors, down, up: tensors.update(
        {down_key: tensors[down].clone(), up_key: tensors[up].clone()}
    )


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
FAULTS = {
    "DoRA": (put(f"{LAYER}.dora_scale"), "DoRA"),
    "DoRA by PEFT": (put("unet.x.lora_magnitude_vector"), "DoRA"),
    "LoHa": (put(f"{LAYER}.hada_w1_a"), "LoHa"),
    "LoKr": (put(f"{LAYER}.lokr_w1"), "LoKr"),
    "OFT": (put(f"{LAYER}.oft_blocks"), "OFT"),
    "Tucker": (put(f"{LAYER}.lora_mid.weight"), "Tucker"),
    "differences": (put(f"{LAYER}.diff"), "whole differences"),
    "embedding": (put("bundle_emb.word.string_to_param.*"), "embedding of a new token"),
    "bias": (put("unet.x.lora_B.bias"), "LoRA with biases"),
    "SDXL": (
        put_pair("lora_te2_text_model_x.lora_down.weight", "lora_te2_text_model_x.lora_up.weight"),
        "LoRA of Stable Diffusion XL .lora_te2_.*the model is of Stable Diffusion 1 and 2",
    ),
    "transformer": (
        put_pair("transformer.blocks.0.lora_A.weight", "transformer.blocks.0.lora_B.weight"),
        "a model with a transformer",
    ),
    "one matrix under two names": (
        lambda tensors, down, up: tensors.update(
            {
                "unet.x.lora_A.weight": torch.ones(2, 2),
                "unet.x.lora_A.default.weight": torch.ones(2),
            }
        ),
        "names the down of its layer twice",
    ),
    "PEFT's own folder": (put("base_model.model.x.lora_A.weight"), "as PEFT saves it"),
    "another name": (put("model.diffusion_model.x"), "not how a LoRA names"),
    "another layer": (
        lambda tensors, down, up: [
            tensors.update({key.replace("mid_block", "mid_block_7"): tensors.pop(key)})
            for key in list(tensors)
        ],
        "is no layer of this model's unet",
    ),
    "another base": (
        lambda tensors, down, up: tensors.update({down: torch.ones(2, 768)}),
        r"its change is \[32, 768\], this model's weight \[32, 32\].*another base",
    ),
    "twice": (
        lambda tensors, down, up: tensors.update(
            {
                f"unet.{LINEAR[0]}.lora_A.weight": tensors[down].clone(),
                f"unet.{LINEAR[0]}.lora_B.weight": tensors[up].clone(),
            }
        ),
        "names mid_block.attentions.0.transformer_blocks.0.attn2.to_k of the unet twice",
    ),
    "rank zero": (
        lambda tensors, down, up: tensors.update({down: torch.ones(0, 32), up: torch.ones(32, 0)}),
        "rank 0",
    ),
    "NaN": (lambda tensors, down, up: tensors[down].fill_(float("nan")), "NaN"),
    "half": (lambda tensors, down, up: tensors.pop(up), "half a LoRA"),
    "ranks": (
        lambda tensors, down, up: tensors.update({up: torch.ones(32, 3)}),
        "do not fit each other",
    ),
    "alpha": (
        lambda tensors, down, up: tensors.update({f"{LAYER}.alpha": torch.tensor(0.0)}),
        "alpha",
    ),
    "whole numbers": (
        lambda tensors, down, up: tensors.update({down: torch.ones(2, 32, dtype=torch.int8)}),
        "expected floats",
    ),
    "nothing": (lambda tensors, down, up: tensors.clear(), "holds no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_plain_lora_of_this_model_is_refused_by_name(model, tmp_path, fault):
    from unlearn.models.lora_layers import place

    change, words = FAULTS[fault]
    path = tmp_path / "broken.safetensors"
    save_file(broken(model, change), path)
    with pytest.raises(UserError, match=words) as caught:
        place(read_lora(parse_name(str(path))), model.pipeline, model.family)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_header_that_says_dora_is_refused(model, tmp_path):
    tensors = peft_names("unet", make_pairs(model.denoiser, LINEAR))
    header = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    save_file(tensors, tmp_path / "x.safetensors", header)
    with pytest.raises(UserError, match="use_dora"):
        read_lora(parse_name(str(tmp_path / "x.safetensors")))


def test_files_are_found_in_folders_and_weights_in_their_names(forms, tmp_path):
    path, _, _ = forms["peft"]
    (tmp_path / "pytorch_lora_weights.safetensors").symlink_to(path)
    (tmp_path / "other.safetensors").symlink_to(path)
    assert parse_name(f"{tmp_path}:0.8").path.name == "pytorch_lora_weights.safetensors"
    assert parse_name(f"{path}:0.8").weight == 0.8 and parse_name(str(path)).weight == 1
    odd = tmp_path / "a:2.safetensors"
    odd.symlink_to(path)
    assert parse_name(str(odd)).path == odd
    (tmp_path / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match="2 such files"):
        parse_name(str(tmp_path))


@pytest.mark.parametrize(
    "name, words",
    {
        "none.safetensors": "no such file",
        "": "no such file",
        "x.safetensors:0": "other than 0",
        "x.safetensors:nan": "other than 0",
        "x.safetensors:much": "no such file",
        "x.bin": "a pickle.*weights_only=True",
        "x.txt": "expected a .safetensors file",
        "empty": "holds no .safetensors file",
        "pickles": "a pickle",
        "damaged.safetensors": "not a whole safetensors file",
    }.items(),
)
def test_a_name_that_is_no_lora_is_one_line(forms, tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.safetensors").symlink_to(forms["peft"][0])
    for file in "x.bin", "x.txt", "damaged.safetensors":
        (tmp_path / file).write_bytes(b"something")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/y.bin").write_bytes(b"something")
    with pytest.raises(UserError, match=words):
        read_lora(parse_name(name))


def test_without_peft_a_line_says_how_to_install_it(forms, monkeypatch):
    monkeypatch.setattr("unlearn.models.lora.is_peft_available", lambda: False)
    with pytest.raises(UserError, match="pip install 'peft>=0.17'"):
        load_model(TINY, "cpu", lora=[str(forms["peft"][0])])
