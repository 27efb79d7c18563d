"""Each family of models: its pipelines load, its loss is that of diffusers' training example, and it
unlearns, scores, resumes and makes pictures. The table of unlearn/README.md names these tests."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FluxPipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_families import (
    CAPTIONS,
    CHAT_LIMIT,
    LIMIT,
    LUMINA_LIMIT,
    PIPELINES,
    RESOLUTION,
    SANA_INSTRUCTION,
    SIZES,
    make_pipeline,
    make_root,
    normalised,
    stable_diffusion_3,
    training_loss,
)

import compute_influence
import compute_training_loss
import unlearn
from unlearn import UserError
from unlearn.attribution import draws, sweeps
from unlearn.attribution.derivatives import second_order_dots, text_gradients
from unlearn.attribution.estimation import FisherSettings, draw_samples, estimate_fisher
from unlearn.attribution.losses import changed_losses, loss_sums, sample_losses
from unlearn.attribution.newton import total_norm
from unlearn.attribution.removal import FeatureMaker, RemovalSettings
from unlearn.commands import examination, fisher, machine
from unlearn.datasets import text_files
from unlearn.datasets.conditioning import map_tensors
from unlearn.datasets.encoders import encode_images, encode_texts, load_image, transform_image
from unlearn.front.models import find_model
from unlearn.front.needs import count_passes
from unlearn.models import pipelines
from unlearn.models.architectures import build, read_architecture
from unlearn.models.customization import check_customization
from unlearn.models.families import guidance
from unlearn.models.generation import decode_latents, generate_latents, initial_noise
from unlearn.models.pipelines import changed_weights, load_model, select_parameters, tracked
from unlearn.models.precision import check_masters
from unlearn.models.selections import list_unread
from unlearn.storage.reading import read_tensors
from unlearn.storage.records import read_record

KV = "cross-attn-kv"
EMBEDDINGS, LATENTS = "laion_text_embeddings", "laion_latents"
SHARED = (1, 0, 1, 1)  # which of the captions each image has, where two share them


class World:
    """A family's tiny pipeline in a folder, its Model, and a data root of four images."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder / "pipeline"
        pipeline = make_pipeline(family)
        pipeline.save_pretrained(self.folder)
        absent = {name: None for name, part in pipeline.components.items() if part is None}
        self.pipeline = pipeline.__class__.from_pretrained(self.folder, **absent)
        self.pipeline.set_progress_bar_config(disable=True)
        self.root = make_root(folder / "root", self.folder)
        self.model = load_model(self.folder, "cpu")
        self.images = unlearn.open_training_set(self.root, self.model)

    @property
    def paths(self):
        """The images' files."""
        return self.images.paths

    @property
    def samples(self):
        """Four images' samples as the Fisher draws them: latents, noise, timesteps, conditioning."""
        count = self.model.num_train_timesteps
        return draw_samples(self.images, [0, 1, 2, 3, 4], count, seed=0)


@pytest.fixture(scope="module")
def worlds():
    """The worlds that were made, by family: each once, for it takes seconds."""
    return {}


@pytest.fixture(scope="module")
def world(request, worlds, tmp_path_factory):
    if (family := request.param) not in worlds:
        worlds[family] = World(family, tmp_path_factory.mktemp(family))
    return worlds[family]


def of(families, slow=()):
    """A test of these tiny pipelines' worlds, some of which are for the slow run."""
    worlds = [
        pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in families
    ]
    return pytest.mark.parametrize("world", worlds, indirect=True, scope="module")


LATER = ["klein", "klein-distilled", "flux2"]  # in the quick run their losses and pictures alone
every_pipeline = of(list(PIPELINES), slow=LATER[1:2])
# Where diffusers' pipeline tells sizes is not by the transformer's own flag, but by its sample size.
every_sampler = of([name for name in PIPELINES if name != "pixart-sized"], slow=LATER[1:2])
MAIN = [name for name in PIPELINES if "-" not in name]
every_family = of(MAIN, slow=LATER)
NEWER = ["zimage", "sana", "sana-euler", "lumina2"]  # of which costly tests run with the slow ones
every_family_at_length = of(MAIN, slow=[*LATER, *NEWER])
# What takes a second of each family, and is the same code for all but a UNet's and a transformer's.
most_often_of_two = of(MAIN, slow=[name for name in MAIN if name not in ("sdxl", "flux")])


def mean_of(vae, pixels):
    """The mean of a VAE's posterior, [C, h, w], of a picture [3, H, W]."""
    is_film = vae.config.get("temperal_downsample") is not None
    pixels = pixels[None, :, None] if is_film else pixels[None]
    encoded = vae.encode(pixels)
    if not hasattr(encoded, "latent_dist"):  # of one without a posterior
        return encoded.latent[0]
    mean = encoded.latent_dist.mean[0]
    return mean[:, 0] if is_film else mean


@every_pipeline
def test_the_loss_is_that_of_diffusers_training_example(world):
    """For the same latents, noise and timesteps; latents and conditioning are compared on the way."""
    model, pipeline = world.model, world.pipeline
    pixels = encode_images(model, world.paths, RESOLUTION)
    timesteps = torch.tensor([3, 250, 600, 999]) % model.num_train_timesteps
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(2))
    texts = encode_texts(model, CAPTIONS, world.paths, RESOLUTION)
    with torch.no_grad():
        means = [mean_of(pipeline.vae, transform(path)) for path in world.paths]
        latents = normalised(world.family, pipeline, torch.stack(means))
        drawn = scheduler_indices(model)[timesteps]
        expected = training_loss(world.family, pipeline, CAPTIONS, SIZES, latents, noise, drawn)
        found = sample_losses(model, latents, noise, timesteps, texts)
    torch.testing.assert_close(pixels, latents, rtol=1e-5, atol=1e-5)  # one by one, and together
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)
    assert found.std() > 1e-3 * found.mean(), "the samples must differ for this to say anything"


@of(list(PIPELINES), slow=[*LATER, *NEWER])
def test_a_model_without_weights_has_the_weights_and_operations_of_the_model(world):
    """Both counted: every parameter's shape, and a forward and backward pass to keys and values."""
    counted = build(read_architecture(world.folder))
    shapes, found = [], []
    for model in (counted, world.model):
        parts = [getattr(model.pipeline, part) for part in ("vae", *model.encoders)]
        parts = [model.denoiser, *parts]
        shapes.append([[value.shape for value in part.parameters()] for part in parts])
        found.append(count_passes(model, select_parameters(model.denoiser, KV), RESOLUTION))
    assert shapes[0] == shapes[1] and found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=0.05)
    assert found[0][1] > 0.5 * found[0][0] > 0


@every_family_at_length
def test_gradient_checkpointing_keeps_less_and_changes_no_bit(world):
    model, settings = world.model, RemovalSettings(timesteps=(3, 700), sketch_size=64)
    found = []
    for _ in range(2):
        maker = FeatureMaker(model, world.images.latents.shape[2:], settings)
        found.append([maker.make(world.images, [1])])
        found[-1] += [each for _, each in text_gradients(model, *world.samples)]
        found[-1].append(count_passes(model, maker.parameters, 2 * RESOLUTION)[2])
        assert model.save_memory() is (len(found) == 1)
    model.denoiser.disable_gradient_checkpointing()
    assert found[1].pop() < found[0].pop()
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


def move_of(model, change, samples):
    """How far predictions move under a weight change."""
    latents, noise, timesteps, texts = samples
    noisy = model.diffuse(latents, noise, timesteps)
    with torch.no_grad():
        before = model.predict(noisy, timesteps, texts)
        with changed_weights(model.denoiser, change):
            return model.predict(noisy, timesteps, texts) - before


@every_family_at_length
def test_weights_in_bfloat16_keep_what_is_unlearned_in_float32(world, monkeypatch):
    """A weight change of one thousandth moves predictions as in float32, and losses by the same
    derivative; rounded with the weights it would be lost. Features are those of float32, but for
    rounding."""
    half = load_model(world.folder, "cpu", weights="bf16")
    # FLUX rounds timesteps and guidance, in training in half precision too: to such as these.
    monkeypatch.setattr(guidance, "GUIDANCE", 2.0)
    nearest = torch.tensor([0.125, 0.25, 0.5])[(3 * world.model.levels).long().clamp(max=2)]
    half, exact = (replace(model, levels=nearest) for model in (half, world.model))
    kept = select_parameters(half.denoiser, KV)
    of_layers = {f"{name.rpartition('.')[0]}.bias" for name in kept} | kept.keys()
    for name, value in half.denoiser.named_parameters():
        assert value.dtype == (torch.float32 if name in of_layers else torch.bfloat16)
    assert (
        half.identity["weights_precision"] == "bf16" and "weights_precision" not in exact.identity
    )
    gradients = [
        {name: each.sum(dim=0) for name, each in text_gradients(model, *world.samples)}
        for model in (exact, half)
    ]
    size = 1e-3 * total_norm(kept) / total_norm(gradients[0])
    change = {name: size * gradient for name, gradient in gradients[0].items()}
    slopes = [
        float(sum((each[name] * change[name]).sum() for name in change)) for each in gradients
    ]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.05)
    exact_move, move = (move_of(model, change, world.samples) for model in (exact, half))
    assert float((move * exact_move).sum() / exact_move.square().sum()) == pytest.approx(1, abs=0.4)
    for value in kept.values():  # where they were rounded like the others
        rounded = value.detach().bfloat16()
        left = (rounded.float() * 1.001).bfloat16() - rounded
        assert left.abs().sum() < 0.5e-3 * rounded.abs().sum()
    settings = RemovalSettings(timesteps=(700,), sketch_size=64)
    features = [
        FeatureMaker(model, world.images.latents.shape[2:], settings).make(world.images, [1])
        for model in (exact, half)
    ]
    np.testing.assert_allclose(features[1], features[0], atol=0.1 * np.abs(features[0]).max())
    with pytest.raises(UserError, match="is in half precision"):
        check_masters(select_parameters(half.denoiser, "all"), "all")


def scheduler_indices(model):
    """Of each training timestep its index in the scheduler's own table."""
    count = model.num_train_timesteps
    find = getattr(model.family, "indices", torch.arange)
    return find(count)


def transform(path):
    """A picture as this program brings it to a square; tests/test_pictures.py is about that."""
    return transform_image(load_image(path), RESOLUTION)


@every_family
def test_all_conditioning_changes_the_loss(world):
    latents, noise, timesteps, conditioning = world.samples
    with torch.no_grad():
        before = sample_losses(world.model, latents, noise, timesteps, conditioning)
        for name, tensor in conditioning.items():
            other = {**conditioning, name: changed_kind(tensor)}
            after = sample_losses(world.model, latents, noise, timesteps, other)
            assert ((after - before).abs() > 1e-7 * before).all(), name


def changed_kind(tensor):
    """Another tensor of the same kind: a mask stays a mask."""
    return 1 - tensor if set(tensor.unique().tolist()) <= {0, 1} else tensor * 1.5 + 1


@every_family
def test_what_is_encoded_is_what_the_data_root_holds(world):
    texts = encode_texts(world.model, CAPTIONS, world.paths, RESOLUTION)
    assert list(texts) == list(world.images.conditioning) == list(world.model.conditioning_shapes)
    for name, tensor in texts.items():
        found = world.images.conditioning[name]
        assert found.shape[2:] == world.model.conditioning_shapes[name]
        np.testing.assert_allclose(found[:, 0], tensor, atol=1e-5)
        part = "" if name == "embeddings" else f"_{name}"
        record = json.loads((world.root / f"{EMBEDDINGS}{part}.json").read_text())
        assert record["identity"]["text_encoder"]


def bits(values):
    """The bits of float32, which tell -0 from 0 too."""
    return np.ascontiguousarray(values, np.float32).view(np.int32)


@every_pipeline
def test_a_caption_of_many_images_stands_on_the_disk_once_and_is_given_bit_by_bit(world, tmp_path):
    """Without the zeros that a text is filled up with; where they were published so, image by image."""
    root, captions = make_root(tmp_path / "root", world.folder), [CAPTIONS[row] for row in SHARED]
    (root / "laion_subset/captions.txt").write_text("\n".join(captions) + "\n")
    images, shapes = unlearn.open_training_set(root, world.model), world.model.conditioning_shapes
    is_once = not world.model.is_stored_by_image
    texts = world.model.encode_prompts([CAPTIONS[1], CAPTIONS[0]] if is_once else captions)
    for name, tensor in texts.items():
        expected = tensor[[int(row == 0) for row in SHARED]] if is_once else tensor
        assert np.array_equal(bits(images.conditioning[name][:, 0]), bits(expected)), name
        assert images.conditioning[name].shape == (4, 1, *shapes[name])
    states = texts["embeddings"].numpy()
    kept = sum(int(text.any(axis=1).nonzero()[0].max()) + 1 for text in states)
    assert kept < states.shape[0] * states.shape[1] or world.family not in ("qwen", "zimage")
    on_disk = kept if is_once else 4 * states.shape[1]
    size = (root / f"{EMBEDDINGS}.npy").stat().st_size
    assert size == 128 + 4 * on_disk * states.shape[2]
    assert (root / f"{EMBEDDINGS}_index.npy").exists() == is_once


@every_family_at_length
def test_texts_of_encoders_in_bfloat16_take_half_of_the_bytes_and_lose_none(world, tmp_path):
    half = load_model(world.folder, "cpu", weights="bf16")
    root = make_root(tmp_path / "root", world.folder)
    images = unlearn.open_training_set(root, half)
    for name, tensor in half.encode_prompts(CAPTIONS).items():
        assert np.array_equal(bits(images.conditioning[name][:, 0]), bits(tensor)), name
    stored, exact = (np.load(folder / f"{EMBEDDINGS}.npy") for folder in (root, world.root))
    is_once = not world.model.is_stored_by_image
    assert stored.dtype == (np.uint16 if is_once else np.float32) and stored.shape == exact.shape


@every_family
def test_gradients_of_keys_and_values_equal_autograd_of_each_text(world):
    """Two samples a text, whose gradients are summed."""
    model, (latents, noise, timesteps, texts) = world.model, world.samples
    parameters = select_parameters(model.denoiser, KV)
    texts = map_tensors(lambda tensor: tensor[:2], texts)
    samples = [tensor[:4] for tensor in (latents, noise, timesteps)]
    found = dict(text_gradients(model, *samples, texts))
    assert found.keys() == parameters.keys()
    for text in range(2):
        own = slice(2 * text, 2 * text + 2)
        with tracked(parameters):
            one = map_tensors(lambda tensor: tensor[text : text + 1], texts)
            loss = sample_losses(model, *(tensor[own] for tensor in samples), one).sum()
            expected = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, expected):
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(
                found[name][text], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name
            )


def idle_weights(denoiser, predict):
    """Names of the weights of a denoiser in float64 whose derivatives of a prediction are zero but for
    rounding."""
    parameters = dict(denoiser.named_parameters())
    with tracked(parameters):
        output = predict()
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(
            output, list(parameters.values()), direction.to(output), materialize_grads=True
        )
    return {name for name, each in zip(parameters, gradients) if each.norm() < 1e-12}


@every_pipeline
def test_a_weight_is_left_out_exactly_where_no_prediction_depends_on_it(world):
    model, (latents, noise, timesteps, texts) = world.model, world.samples
    texts = map_tensors(lambda each: each.double() if each.is_floating_point() else each, texts)
    noisy = model.diffuse(latents, noise, timesteps).double()
    model.denoiser.double()
    try:
        idle = idle_weights(model.denoiser, lambda: model.predict(noisy, timesteps, texts))
    finally:
        model.denoiser.float()
    assert set(list_unread(model.denoiser, "all")) == idle
    has_some = world.family.startswith(("sd3", "pixart", "qwen")) or world.family == "sana"
    assert bool(idle) is has_some
    assert not set(select_parameters(model.denoiser, "attn")) & idle
    assert idle < select_parameters(model.denoiser, "all", with_unread=True).keys()
    assert list_unread(model.denoiser, KV) == []


def test_keys_of_self_attention_without_norms_have_no_bias_that_matters():
    """Stable Diffusion 3 with dual attention and without norms, which nobody has published."""
    denoiser = stable_diffusion_3(dual_attention_layers=(0,)).transformer.double()
    drawn = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    told = drawn(1, 8, 8, 8), drawn(1, 5, 32), drawn(1, 20), torch.tensor([500])
    idle = idle_weights(denoiser, lambda: denoiser(*told).sample)
    assert "transformer_blocks.0.attn2.to_k.bias" in idle
    assert set(list_unread(denoiser, "all")) == idle


@of(["sd3", "pixart", "qwen"])
@pytest.mark.parametrize("selection", ["cross-attn", "all"])
def test_selections_with_weights_that_nothing_reads_are_unlearned(
    world, selection, tmp_path, caplog
):
    caplog.set_level("INFO")
    path, model = tmp_path / "fisher.safetensors", world.model
    settings = FisherSettings(8, selection)
    estimate_fisher(model, world.images, settings, path)
    unread = list_unread(model.denoiser, selection)
    assert caplog.text.count(f"without {len(unread)} on which no prediction depends") == 1
    assert read_record(path, "")["identity"]["unread"] == len(unread) > 0
    estimated = unlearn.load_fisher(path, model, weight_selection=selection)
    query = unlearn.encode_query(model, world.root / "synth/query.png", "a red square")
    delta = unlearn.unlearn(model, query, estimated, draws=4)
    assert delta.tensors.keys() == select_parameters(model.denoiser, selection).keys()
    assert all(torch.isfinite(each).all() and each.any() for each in delta.tensors.values())


def random_change(model, size=0.05):
    """A weight change of keys and values, relative to their norm."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, value in select_parameters(model.denoiser, KV).items():
        direction = torch.randn(value.shape, generator=generator)
        changes[name] = size * value.detach().norm() / direction.norm() * direction
    return changes


@every_family
def test_losses_under_a_change_of_keys_and_values_equal_those_of_changed_weights(world):
    model, samples, change = world.model, world.samples, random_change(world.model)
    with changed_losses(model, [change]) as measure_of:
        found = measure_of([0])(model, *samples)[:, 0]
    before = loss_sums(model, *samples)
    with changed_weights(model.denoiser, change):
        expected = loss_sums(model, *samples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert ((found - before).abs() > 1e-8 * before).all()
    torch.testing.assert_close(loss_sums(model, *samples), before, rtol=0, atol=0)


@every_family_at_length
def test_the_second_order_of_a_small_change_is_its_loss_change(world):
    model, samples, change = world.model, world.samples, random_change(world.model, 1e-3)
    found = second_order_dots([change])(model, *samples)[:, 0]
    with changed_weights(model.denoiser, change):
        after = loss_sums(model, *samples)
    expected = after - loss_sums(model, *samples)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=float(expected.abs().max()) / 50)


@every_sampler
def test_pictures_are_those_of_the_family_s_own_pipeline(world):
    """From the same noise, in the same steps, under the same guidance."""
    model, pipeline = world.model, world.pipeline
    texts = encode_texts(model, CAPTIONS[:2], [None, None], RESOLUTION)
    start = torch.from_numpy(initial_noise("tiny", [0, 1], model.latent_shape(RESOLUTION)))
    guidance = 1.0 if world.family in ("flux-schnell", "klein-distilled") else 4.0
    made = generate_latents(model, texts, start, num_steps=3, guidance_scale=guidance)
    expected = sample_by_pipeline(world, pipeline, start, guidance)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    plain = generate_latents(model, texts, start, num_steps=3)
    if guidance > 1:
        assert (made - plain).abs().mean() > 1e-3 * made.std(), "guidance must matter"
    pixels = decode_latents(model, made)
    assert pixels.shape == (2, RESOLUTION, RESOLUTION, 3) and pixels.std() > 0


def start_of(pipeline, family, start):
    """Noise as a pipeline takes it."""
    return pipeline._patchify_latents(start) if family in ("klein", "flux2") else start.clone()


def sample_by_pipeline(world, pipeline, start, guidance_scale):
    """Latents [2, C, h, w] that diffusers' own pipeline makes of the first two captions."""
    own, family = pipeline.scheduler, world.family.partition("-")[0]
    if family in ("sd", "sdxl", "pixart"):
        pipeline.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False)
    more = {
        "pixart": {"use_resolution_binning": False, "max_sequence_length": LIMIT + 4},
        "sd3": {"max_sequence_length": LIMIT + 4 if pipeline.components.get("tokenizer_3") else 77},
        "flux": {"max_sequence_length": LIMIT + 4},
        "qwen": {"max_sequence_length": LIMIT + 4, "negative_prompt": [" "] * 2},
        "klein": {"max_sequence_length": LIMIT + 10},
        "flux2": {"max_sequence_length": LIMIT + 40},
        "zimage": {"max_sequence_length": CHAT_LIMIT},
        "sana": {"use_resolution_binning": False, "max_sequence_length": LIMIT + 4},
        "lumina2": {"max_sequence_length": LUMINA_LIMIT},
    }.get(family, {})
    if family == "zimage":
        guidance_scale -= 1  # it counts from 0
    is_packed = family in ("flux", "qwen")
    if is_packed:
        packed = FluxPipeline._pack_latents(start, *start.shape)
    scale = "true_cfg_scale" if family == "qwen" else "guidance_scale"
    try:
        latents = pipeline(
            prompt=CAPTIONS[:2],
            **dict.fromkeys(("height", "width"), 32 if family == "sana" else RESOLUTION),
            num_inference_steps=3,
            latents=packed if is_packed else start_of(pipeline, family, start),
            output_type="latent",
            **{scale: guidance_scale},
            **more,
        ).images
    finally:
        pipeline.scheduler = own
    if family == "klein":  # as its VAE takes them
        return world.model.family.normalise(pipeline.vae, latents)
    if not is_packed and family != "flux2":
        return latents
    factor = pipeline.vae_scale_factor
    return FluxPipeline._unpack_latents(latents, RESOLUTION, RESOLUTION, factor)


@every_family
def test_features_of_removal_are_made_of_every_image(world):
    settings = RemovalSettings(timesteps=(350,), sketch_size=64)
    maker = FeatureMaker(world.model, world.images.latents.shape[2:], settings)
    features = maker.make(world.images, range(4))
    rows = settings.probes
    assert features.shape == (4, len(settings.timesteps), rows, 64)
    assert np.isfinite(features).all()
    assert np.abs(np.diff(features, axis=0)).max(axis=(1, 2, 3)).min() > 0


def arrays_of(root):
    """Bytes of what is encoded of a data root, by file."""
    return {path.name: path.read_bytes() for path in sorted(root.glob("laion_*.npy"))}


@every_family_at_length
def test_encoding_that_was_stopped_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    root = make_root(tmp_path / "root", world.folder)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(text_files, "encode_prompts", lambda *args: 1 / 0)
        unlearn.open_training_set(root, world.model)
    assert list(arrays_of(root)) == [f"{LATENTS}.npy"]
    before = (root / f"{LATENTS}.npy").stat().st_mtime_ns
    again = unlearn.open_training_set(root, world.model)
    assert arrays_of(root) == arrays_of(world.root) and again.identity == world.images.identity
    assert (root / f"{LATENTS}.npy").stat().st_mtime_ns == before


@every_family_at_length
def test_losses_that_were_stopped_go_on_to_the_same_bits(world, tmp_path, monkeypatch):
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (1,))
    scored, real = [], sweeps.score_rows

    def stopped(*args):
        scored.append(args[2])
        return real(*args) if len(scored) < 3 else 1 / 0

    how = {"cache": tmp_path, "time_samples": 2}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sweeps, "score_rows", stopped)
        unlearn.compute_losses(world.model, world.images, **how)
    kept, again = scored[:2], []
    monkeypatch.setattr(sweeps, "score_rows", lambda *args: again.append(args[2]) or real(*args))
    found = unlearn.compute_losses(world.model, world.images, **how)
    assert sorted(int(rows[0]) for rows in (*kept, *again)) == [0, 1, 2, 3]
    assert np.array_equal(found, unlearn.compute_losses(world.model, world.images, time_samples=2))


RUN = ["--loss_time_samples", "2", "--unlearn_batch_size", "4", "--unlearn_grad_accum_steps", "2"]


@every_family
def test_both_scripts_unlearn_and_score(world, tmp_path):
    flags = ["--dataroot", str(world.root), "--device", "cpu"]
    tasks = [*flags, "--task_json", str(world.root / "tasks.json"), "--result_dir", str(tmp_path)]
    fisher.main([*flags, "--num_samples", "16"])
    compute_training_loss.main([*tasks, "--time_samples", "2"])
    compute_influence.main([*tasks, *RUN])
    folder = tmp_path / "influence/query.png"
    found = np.load(folder / "influence.npz")["influence"]
    assert len(found) == 4 and np.isfinite(found).all() and found.std() > 0
    change = read_tensors(folder / "weight_change.safetensors")
    assert change.keys() == select_parameters(world.model.denoiser, KV).keys()


@of(list(PIPELINES), slow=LATER)
def test_doctor_finds_the_pipeline_in_order(world):
    found = examination.examine_pipeline(str(world.folder), "")
    assert (found.status, found.text) == (machine.OK, f"pipeline {world.folder}")
    parts = examination.read_parts(world.folder)
    assert parts.family is world.model.family
    examination.check_shapes(world.root, parts, RESOLUTION)


@most_often_of_two
def test_sharded_weights_and_those_of_half_precision_load(world, tmp_path):
    sharded = tmp_path / "sharded"
    make_pipeline(world.family).save_pretrained(sharded, max_shard_size="20KB")
    assert list(sharded.glob("*/*.index.json"))
    assert load_model(sharded, "cpu").weights_hash == world.model.weights_hash
    half = tmp_path / "half"
    make_pipeline(world.family).to(torch.float16).save_pretrained(half)
    model = load_model(half, "cpu")
    assert model.denoiser.dtype == torch.float32
    assert model.weights_hash != world.model.weights_hash


@of(["sdxl"])
def test_weights_that_were_saved_fused_are_refused_by_name(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "pipeline")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors, layer = load_file(path), "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors[f"{layer}.to_qkv.weight"] = torch.cat(
        [tensors.pop(f"{layer}.to_{one}.weight") for one in "qkv"]
    )
    save_file(tensors, path)
    with pytest.raises(
        UserError, match="its unet lacks 3 weights, first mid_block.*; its attention's projections"
    ):
        load_model(folder, "cpu")


@of([name for name in MAIN if name != "sd"], slow=LATER)
def test_customized_models_of_other_families_are_refused_by_name(world, tmp_path):
    with pytest.raises(UserError, match="are those of Stable Diffusion 1 and 2; this model is of"):
        check_customization(world.model, str(tmp_path))


MISFITS = {  # family, part, its configuration, what is said
    "nine channels": ("sdxl", "unet", {"in_channels": 9}, "takes 9 channels.*inpainting"),
    "the refiner's five time ids": (
        "sdxl",
        "unet",
        {"projection_class_embeddings_input_dim": 12 + 5 * 4},
        "takes 32 numbers of pooled text and time ids.*the refiner takes five",
    ),
    "x0": ("sdxl", "scheduler", {"prediction_type": "sample"}, "unknown prediction type sample"),
    "Playground": ("sdxl", "vae", {"latents_mean": [0, 0, 0, 0]}, "Playground 2.5"),
    "text of another width": ("sdxl", "unet", {"cross_attention_dim": 8}, "together have 24"),
    "FLUX Fill": ("flux", "transformer", {"in_channels": 96}, "in_channels 96.* packed, 32"),
    "T5 of another width": ("sd3", "transformer", {"joint_attention_dim": 64}, "encoder gives 32"),
    "captions": ("pixart", "transformer", {"caption_channels": 64}, "text encoder gives 20"),
    "Qwen-Image-Edit": ("qwen", "transformer", {"zero_cond_t": True}, "is that of Qwen-Image-Edit"),
    "Qwen-Image-Layered": (
        "qwen",
        "transformer",
        {"use_layer3d_rope": True},
        "is that of Qwen-Image-Layered",
    ),
    "states of another width": ("qwen", "transformer", {"joint_attention_dim": 8}, "gives 16"),
    "latents without a deviation": (
        "qwen",
        "vae",
        {"latents_std": [1.0, 0.0, 1.0, 1.0]},
        "latents_std: expected a number for each of 4 channels",
    ),
    "quantized weights": (
        "qwen",
        "transformer",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "its transformer is quantized .bitsandbytes.; expected weights in float32",
    ),
    "klein's encoder is the smaller one": (
        "klein",
        "transformer",
        {"joint_attention_dim": 36},
        "3 layers of its text encoder give 48",
    ),
    "Z-Image-Omni": ("zimage", "transformer", {"siglip_feat_dim": 8}, "as that of Z-Image-Omni"),
    "Qwen3 of another width": ("zimage", "transformer", {"cap_feat_dim": 64}, "encoder gives 20"),
    "other patches": (
        "zimage",
        "transformer",
        {"all_patch_size": [4]},
        "expected of 2 x 2 latents",
    ),
    "SANA-Sprint": ("sana", "transformer", {"guidance_embeds": True}, "as that of SANA-Sprint"),
    "Sprint's pipeline": (
        "sana",
        "model_index",
        {"_class_name": "SanaSprintPipeline"},
        "SanaSprintPipeline has a transformer of the class SanaTransformer2DModel; supported are",
    ),
    "a solver of betas": (
        "sana",
        "scheduler",
        {"prediction_type": "epsilon"},
        "the prediction_type epsilon, use_flow_sigmas True .* expected flow_prediction",
    ),
    "Gemma of another width": ("sana", "transformer", {"caption_channels": 8}, "encoder gives 20"),
    "Lumina2 of more channels": (
        "lumina2",
        "transformer",
        {"out_channels": 16},
        "takes 8 channels and gives 16; expected 8",
    ),
    "another pipeline of the parts": (
        "zimage",
        "model_index",
        {"_class_name": "ZImageOmniPipeline"},
        "ZImageOmniPipeline has a transformer of the class ZImageTransformer2DModel; supported are",
    ),
    "another text encoder": (
        "zimage",
        "model_index",
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        "its text_encoder is of the class T5EncoderModel; supported: Qwen3Model",
    ),
    "flows turned round": ("flux", "scheduler", {"invert_sigmas": True}, "the other way round"),
}


@pytest.mark.parametrize(
    "world, part, values, words",
    MISFITS.values(),
    ids=MISFITS,
    indirect=["world"],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_loaded(
    world, part, values, words, tmp_path, monkeypatch
):
    folder = shutil.copytree(world.folder, tmp_path / "pipeline")
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path = folder / "model_index.json" if part == "model_index" else path
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    monkeypatch.setattr(pipelines.DiffusionPipeline, "from_pretrained", None)
    with pytest.raises(UserError, match=words):
        load_model(folder, "cpu")
    assert examination.examine_pipeline(str(folder), "").status == machine.PROBLEM


STRANGERS = {  # what a pipeline's index names instead, and what is said
    "its edit pipeline": (
        {"_class_name": "QwenImageEditPipeline"},
        "QwenImageEditPipeline has a transformer of the class QwenImageTransformer2DModel; supported",
    ),
    "another text encoder": (
        {"text_encoder": ["transformers", "Qwen3ForCausalLM"]},
        "text_encoder is of the class Qwen3ForCausalLM; supported: Qwen2_5_VL",
    ),
}


@of(["qwen"])
@pytest.mark.parametrize("values, words", STRANGERS.values(), ids=STRANGERS)
def test_pipelines_of_other_classes_are_refused_by_name(world, values, words, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "pipeline")
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError, match=words):
        load_model(folder, "cpu")


@of(["flux2"])
def test_what_reads_pictures_too_is_not_loaded_for_its_tokenizer(world, tmp_path):
    """FLUX.2-dev is published with a PixtralProcessor, which takes torchvision."""
    folder = shutil.copytree(world.folder, tmp_path / "pipeline")
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "tokenizer": ["transformers", "PixtralProcessor"]}))
    model = load_model(folder, "cpu")
    assert model.identity == world.model.identity
    assert model.tokenize(["a dog"]) == world.model.tokenize(["a dog"])


OWN_LIMITS = {"qwen": LIMIT + 4, "klein": LIMIT + 10, "flux2": LIMIT + 40}


@of(list(OWN_LIMITS))
def test_prompts_are_read_as_by_the_family_s_own_pipeline(world):
    """Each alone, for a pipeline reads a prompt otherwise beside longer ones; those that are too
    long too."""
    prompts = ["", "a red circle", "{} " + "the tree in the dark " * 9]
    limit = OWN_LIMITS[world.family]
    texts = world.model.encode_prompts(prompts)
    for row, prompt in enumerate(prompts):
        expected = world.pipeline.encode_prompt([prompt], max_sequence_length=limit)[0][0]
        found = texts["embeddings"][row]
        if "mask" in texts:
            assert int(texts["mask"][row].sum()) == len(expected)
            assert not found[len(expected) :].any()
        torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-5, atol=1e-6)
    assert len(expected) == len(found), "the last one fills all tokens"


def encode_by_pipeline(world, prompts):
    """Hidden states [tokens, features] of prompts as diffusers' own pipeline reads them by itself,
    without those that nothing attends to."""
    encode = world.pipeline.encode_prompt
    with torch.no_grad():
        if world.family == "zimage":
            return encode(list(prompts), "cpu", False, max_sequence_length=CHAT_LIMIT)[0]
        own = {
            "sana": {
                "max_sequence_length": LIMIT + 4,
                "complex_human_instruction": SANA_INSTRUCTION,
            },
            "lumina2": {"max_sequence_length": LUMINA_LIMIT},
        }[world.family]
        states, mask = encode(list(prompts), do_classifier_free_guidance=False, **own)[:2]
    return [row[attended.bool()] for row, attended in zip(states, mask)]


@of(["zimage", "sana", "lumina2"])
def test_texts_of_language_models_are_those_of_the_family_s_own_pipeline(world):
    """Of all lengths, one that is cut and the empty one among them, with the chat or the instruction
    that the pipeline puts around them."""
    model, prompts = world.model, [*CAPTIONS, "Red " * 60, ""]
    found, expected = model.encode_prompts(prompts), encode_by_pipeline(world, prompts)
    assert len({len(states) for states in expected}) > 3
    for states, mask, own in zip(found["embeddings"], found["mask"], expected, strict=True):
        torch.testing.assert_close(states[mask.bool()], own, rtol=1e-5, atol=1e-5)
    tokenizer, limit = model.reader
    [short, long] = (
        model.tokenize([" ".join(["red"] * count)])["tokens"][0]
        for count in ((limit - 1) // 4, limit + 1)
    )
    assert tokenizer.pad_token_id in short and tokenizer.pad_token_id not in long


@of(["zimage", "klein", "flux2"])
def test_a_chat_template_that_came_with_a_tokenizer_is_not_run(world):
    tokenizer, before = world.model.reader[0], world.model.encode_prompts(CAPTIONS)
    with_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ 1 / 0 }}"
        if world.family == "zimage":  # which puts padding last, wherever it was
            tokenizer.padding_side = "left"
        after = world.model.encode_prompts(CAPTIONS)
    finally:
        tokenizer.chat_template, tokenizer.padding_side = with_template, "right"
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)


@of(["lumina2"])
def test_the_sigmas_of_lumina2_are_shares_of_the_picture(world):
    """They are shifted to the picture, where all others are shifted to the noise; noise rises with
    the timestep all the same."""
    levels = world.model.levels
    assert (levels.diff() > 0).all() and levels[0] == 0 and levels[-1] < 1
    assert float(levels.median()) == pytest.approx(1 - 6 / 7, abs=1e-3)  # of a shift of 6


@of(["sd3", "flux"])
def test_timesteps_of_flows_are_evenly_probable_quantiles_of_the_density_of_training(world):
    """Diffusers' own draws: as many of them fall between two neighbours as between any others."""
    scheme = "logit_normal" if world.family == "sd3" else "none"
    torch.manual_seed(0)
    drawn = compute_density_for_timestep_sampling(scheme, 200_000, 0.0, 1.0, 1.29)
    count = world.model.num_train_timesteps
    indices = world.model.family.indices(count)
    assert (indices.diff() <= 0).all(), "noise rises with the timestep"
    edges = (indices[::100].flip(0).double() + 0.5) / count
    shares = torch.histogram(
        drawn.double(), torch.cat([torch.zeros(1), edges, torch.ones(1)]).double()
    )
    assert ((shares.hist[1:-1] / len(drawn) - 0.1).abs() < 0.01).all()


@of(["flux"])
def test_resolutions_that_cannot_be_packed_are_refused(world):
    with pytest.raises(UserError, match="resolution 18: expected a multiple of 4, because FLUX.1"):
        world.model.resolution({"resolution": 18})


@of(["sd3"])
def test_resolutions_beyond_the_positions_are_refused(world):
    with pytest.raises(UserError, match="resolution 64: expected at most 32, as the transformer"):
        world.model.resolution({"resolution": 64})


@of(["flux-schnell"])
def test_guidance_of_a_model_that_takes_none_is_refused(world):
    texts = encode_texts(world.model, ["a dog"], [None], RESOLUTION)
    with pytest.raises(UserError, match="takes none .its guidance_embeds is false"):
        world.model.family.guide(world.model.pipeline, texts, 7.5)


@of(["sdxl"])
def test_one_command_attributes_a_picture(world, tmp_path):
    """The query is a training image made a little darker: it comes first."""
    images = shutil.copytree(world.root / "laion_subset/images", tmp_path / "images")
    for path, caption in zip(sorted(images.iterdir()), CAPTIONS):
        path.with_suffix(".txt").write_text(caption)
    picture = Image.open(images / "0000.png").point(lambda value: value * 0.9)
    picture.save(tmp_path / "picture.png")
    [answer] = unlearn.attribute(
        tmp_path / "picture.png",
        model=world.folder,
        images=images,
        prompt=CAPTIONS[0],
        out=tmp_path / "out",
        device="cpu",
    )
    assert answer.scores.argmax() == 0 and len(answer.scores) == 4
    assert (answer.folder / "report.html").is_file()
    beside = sorted(path.name for path in (tmp_path / "out/root").glob(f"{EMBEDDINGS}*.npy"))
    assert beside == [f"{EMBEDDINGS}{end}.npy" for end in ("", "_index", "_pooled", "_time_ids")]


@most_often_of_two
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["whole", "sharded"])
def test_attribute_finds_the_weights_of_a_variant(world, tmp_path, shards):
    how = {"variant": "fp16", **shards}
    make_pipeline(world.family).to(torch.float16).save_pretrained(tmp_path / "own", **how)
    assert bool(list(tmp_path.glob("own/*/*.index.fp16.json"))) == bool(shards)
    source = find_model(tmp_path / "own", None, tmp_path / "links")
    loaded = load_model(source.pipeline, "cpu")
    weights, own = loaded.denoiser.state_dict(), world.model.denoiser.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-4)


@every_family_at_length
def test_latents_of_another_model_are_not_taken_for_this_one_s(world, tmp_path):
    """A family's identity holds all of its text encoders."""
    pipeline = make_pipeline(world.family)
    last = list(world.model.family.encoders)[-1]
    for parameter in getattr(pipeline, last).parameters():
        parameter.data *= 1.1
    pipeline.save_pretrained(tmp_path / "pipeline")
    root = shutil.copytree(world.root, tmp_path / "root")
    own = world.images
    again = unlearn.open_training_set(root, load_model(tmp_path / "pipeline", "cpu"))
    assert again.identity != own.identity
    assert not np.array_equal(again.embeddings, own.embeddings) or not all(
        np.array_equal(again.extras[name], own.extras[name]) for name in own.extras
    )
