"""Customized models as their authors' program and diffusers save them: content decides."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, CustomDiffusionAttnProcessor
from safetensors.torch import load_file, save_file
from tiny_families import make_pipeline

import unlearn
from unlearn import UserError
from unlearn.attribution import estimation
from unlearn.datasets.conditioning import TEXT
from unlearn.front.loading import load_source
from unlearn.front.models import find_model
from unlearn.models.customization import customized, read_customization
from unlearn.storage.reading import read_tensors

PIPELINE, BLOB = str(PARITY / "fixture/sd-tiny"), PARITY / "fixture/abc/models/tiny/blob"
WEIGHTS, TOKEN = "pytorch_custom_diffusion_weights", "<new1>"


@pytest.fixture(scope="module")
def published():
    return read_customization(BLOB)


def save_by_diffusers(folder, weights, safe):
    """What diffusers itself writes of a UNet that was customized."""
    unet = UNet2DConditionModel.from_pretrained(PIPELINE, subfolder="unet")
    processors = {name: AttnProcessor2_0() for name in unet.attn_processors}
    for name in processors:
        layer = name.removesuffix(".processor")
        if f"{layer}.to_k.weight" not in weights:
            processors[name] = CustomDiffusionAttnProcessor(train_kv=False, train_q_out=False)
            continue
        size, features = weights[f"{layer}.to_k.weight"].shape
        processor = CustomDiffusionAttnProcessor(True, False, size, features)
        for part in ("k", "v"):
            own = getattr(processor, f"to_{part}_custom_diffusion")
            own.weight.data = weights[f"{layer}.to_{part}.weight"].clone()
        processors[name] = processor
    unet.set_attn_processor(processors)
    unet.save_attn_procs(folder, safe_serialization=safe)


def as_safetensors(folder, weights, vector):
    save_by_diffusers(folder, weights, safe=True)
    save_file({TOKEN: vector}, folder / f"{TOKEN}.safetensors")


def as_bin(folder, weights, vector):
    save_by_diffusers(folder, weights, safe=False)
    torch.save({TOKEN: vector}, folder / f"{TOKEN}.bin")


def as_safetensors_named_bin(folder, weights, vector):
    save_by_diffusers(folder, weights, safe=True)
    save_file({TOKEN: vector}, folder / f"{TOKEN}.bin")


def as_textual_inversion(folder, weights, vector):
    save_by_diffusers(folder, weights, safe=True)
    save_file({TOKEN: vector[None].clone()}, folder / "learned_embeds.safetensors")


def beside_other_files(folder, weights, vector):
    as_bin(folder, weights, vector)
    torch.save({"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}, folder / "optimizer.bin")
    torch.save({"unet": weights, "modifier_token": {TOKEN: vector}}, folder / "delta.bin")
    torch.save({"conv.weight": torch.ones(3)}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"anything")


def compiled(folder, weights, vector):
    renamed = {f"module._orig_mod.{name}": value for name, value in weights.items()}
    torch.save(renamed, folder / f"{WEIGHTS}.pt")
    torch.save({TOKEN: vector}, folder / f"{TOKEN}.bin")


FORMATS = [
    as_safetensors,
    as_bin,
    as_safetensors_named_bin,
    as_textual_inversion,
    beside_other_files,
    compiled,
]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_weights_and_tokens_bit_for_bit(write, published, tmp_path):
    weights, tokens = published
    write(tmp_path, weights, tokens[TOKEN])
    for found, expected in zip(read_customization(tmp_path), published):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_format_gives_the_same_losses_bit_for_bit(published, training_set, model, tmp_path):
    some = training_set.first(2)
    losses, hashes = [], []
    for number, write in enumerate([None, as_safetensors, as_bin, as_textual_inversion]):
        folder = tmp_path / str(number)
        folder.mkdir()
        if write:
            write(folder, published[0], published[1][TOKEN])
        with customized(model, folder if write else BLOB) as mine:
            hashes.append(mine.weights_hash)
            losses.append(unlearn.compute_losses(mine, some))
    assert len(set(hashes)) == 1
    for found in losses[1:]:
        np.testing.assert_array_equal(found, losses[0])
    assert not np.array_equal(losses[0], unlearn.compute_losses(model, some))


@pytest.mark.parametrize(
    "name, content, said",
    [
        (f"{TOKEN}.safetensors", {TOKEN: torch.ones(2, 32)}, "expected 32 numbers, found [2, 32]"),
        ("learned_embeds.bin", {"cat": torch.ones(32)}, "expected new tokens such as <new1>"),
        (f"{TOKEN}.bin", {"a": {"b": 1}}, "expected a dictionary of tensors by name"),
    ],
)
def test_a_file_named_as_a_token_that_holds_none_is_refused(
    name, content, said, published, model, tmp_path
):
    torch.save(published[0], tmp_path / f"{WEIGHTS}.pt")
    if name.endswith(".safetensors"):
        save_file(content, tmp_path / name)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError) as error, customized(model, tmp_path):
        pass
    assert said in str(error.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_names_that_a_compiler_or_a_wrapper_put_before_are_read_without(prefix, suffix, tmp_path):
    path, tensors = tmp_path / f"fisher{suffix}", {"a.weight": torch.ones(2), "b": torch.zeros(3)}
    renamed = {f"{prefix}{name}": value for name, value in tensors.items()}
    save_file(renamed, path) if suffix == ".safetensors" else torch.save(renamed, path)
    assert read_tensors(path).keys() == tensors.keys()
    assert read_tensors(path, names={"b"}).keys() == {"b"}


def test_a_module_that_is_called_module_keeps_its_name(tmp_path):
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x.safetensors")
    assert read_tensors(tmp_path / "x.safetensors").keys() == {"module.a", "b"}


def load_hash(name, base, place):
    return load_source(name, base, place, "cpu")[1].weights_hash


def test_a_pipeline_whose_weights_were_saved_compiled_is_the_same_model(tmp_path):
    mine = Path(shutil.copytree(PIPELINE, tmp_path / "mine"))
    path = mine / "unet/diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": value for name, value in load_file(path).items()}, path)
    assert load_hash(mine, None, tmp_path / "place") == load_hash(PIPELINE, None, tmp_path)


@pytest.mark.parametrize("way", ["folder", "file", "with its pipeline"])
def test_a_customized_models_folder_is_one_model_with_its_base(way, published, tmp_path):
    weights, tokens = published
    folder = tmp_path / "mine"
    if way == "with its pipeline":
        shutil.copytree(PIPELINE, folder)
    folder.mkdir(exist_ok=True)
    as_safetensors(folder, weights, tokens[TOKEN])
    name = folder / f"{WEIGHTS}.safetensors" if way == "file" else folder
    base = None if way == "with its pipeline" else PIPELINE
    source, mine = load_source(name, base, tmp_path / "place", "cpu")
    found = dict(mine.denoiser.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    number = mine.pipeline.tokenizer.convert_tokens_to_ids(TOKEN)
    embedding = mine.pipeline.text_encoder.get_input_embeddings().weight[number]
    assert torch.equal(embedding, tokens[TOKEN])
    stamp = Path(source.pipeline, "model_index.json").stat().st_mtime_ns
    found_again = find_model(name, base, tmp_path / "place")
    assert replace(found_again, weights=source.weights) == source
    assert Path(source.pipeline, "model_index.json").stat().st_mtime_ns == stamp
    assert not list((tmp_path / "place").glob("*.part*"))


def test_a_customized_model_without_or_with_another_base_is_refused_with_the_way_on(
    published, tmp_path
):
    weights, tokens = published
    as_safetensors(tmp_path, weights, tokens[TOKEN])
    with pytest.raises(UserError, match="customized model .*--base MODEL"):
        find_model(tmp_path, None, tmp_path / "place")
    other = Path(shutil.copytree(PIPELINE, tmp_path / "other"))
    (other / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    )
    with pytest.raises(UserError, match="--base"):
        find_model(tmp_path, other, tmp_path / "place")
    assert not list((tmp_path / "place").glob("*/model_index.json"))


def test_one_command_answers_of_a_customized_model_and_its_new_word(
    published, tmp_path, monkeypatch
):
    monkeypatch.setattr(estimation, "FEWEST_SAMPLES", 40)  # the curvature's: it costs the most
    weights, tokens = published
    mine, images = tmp_path / "mine", tmp_path / "images"
    for folder in mine, images:
        folder.mkdir()
    as_safetensors(mine, weights, tokens[TOKEN])
    base = Path(shutil.copytree(PIPELINE, tmp_path / "base"))
    config = json.loads((base / "unet/config.json").read_text())
    (base / "unet/config.json").write_text(json.dumps({**config, "sample_size": 4}))
    for path in sorted((PARITY / "fixture/abc/exemplar/tiny").iterdir())[:2]:
        shutil.copy(path, images)
    query = PARITY / "fixture/abc/synth/tiny/gpt/blob/samples/00000.png"
    plan = {"images": images, "caption": f"{TOKEN} blob", "out": tmp_path / "out", "device": "cpu"}
    [answer] = unlearn.attribute(query, prompt=f"a {TOKEN} blob", model=mine, base=base, **plan)
    assert len(answer.table()) == 2
    with pytest.raises(UserError, match="<new7>"):
        unlearn.attribute(query, prompt="a <new7> blob", model=mine, base=base, **plan)


def write_delta(path, weights, tokens, **more):
    torch.save({"unet": weights, "modifier_token": tokens, **more}, path)
    return path


def test_the_one_file_of_the_authors_program_is_the_model_of_its_folder(published, tmp_path):
    weights, tokens = published
    path = write_delta(tmp_path / "delta-1000.bin", weights, tokens)
    source = find_model(path, PIPELINE, tmp_path / "place")
    expected = find_model(BLOB, PIPELINE, tmp_path / "other")
    one, other = (unlearn.load_model(each.pipeline, "cpu") for each in (expected, source))
    assert one.weights_hash == other.weights_hash
    prompts = [f"photo of a {TOKEN} blob"]
    found, wanted = (model.encode_prompts(prompts)[TEXT] for model in (other, one))
    assert torch.equal(found, wanted)
    assert find_model(path, PIPELINE, tmp_path / "place") == source, "it is made once"


DELTAS = {  # what a file of the authors' program may hold beside, and what is said of it
    "SDXL": (
        lambda weights, vector: (weights, {TOKEN: [vector, vector]}, {}),
        "customized model .* of Stable Diffusion XL .*supported are those of Stable Diffusion 1 and 2",
    ),
    "text encoder": (
        lambda weights, vector: (weights, {TOKEN: vector}, {"text_encoder": {}}),
        "with text_encoder, which was trained too",
    ),
    "compressed": (
        lambda weights, vector: ({"x": {"u": vector, "v": vector}}, {TOKEN: vector}, {}),
        "that was compressed; give the file that it was compressed from",
    ),
    "a word of the vocabulary": (
        lambda weights, vector: (weights, {"cat": vector}, {}),
        "'cat': expected new tokens such as <new1>",
    ),
}


@pytest.mark.parametrize("fault", DELTAS)
def test_a_file_of_the_authors_program_that_holds_more_is_refused_by_name(
    fault, published, tmp_path
):
    change, said = DELTAS[fault]
    weights, tokens, more = change(published[0], published[1][TOKEN])
    path = write_delta(tmp_path / "delta.bin", weights, tokens, **more)
    with pytest.raises(UserError, match=said) as caught:
        find_model(path, PIPELINE, tmp_path / "place")
    assert "\n" not in str(caught.value) and not (tmp_path / "place").exists()


def test_a_customized_model_of_another_family_is_refused_by_name(published, tmp_path):
    as_safetensors(tmp_path, *published[:1], published[1][TOKEN])
    make_pipeline("sdxl").save_pretrained(tmp_path / "xl")
    with pytest.raises(
        UserError, match=r"are those of Stable Diffusion 1 and 2; .* of Stable Diff.* XL"
    ):
        find_model(tmp_path, tmp_path / "xl", tmp_path / "place")
