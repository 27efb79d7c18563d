"""The benchmark: its rows are complete, its published loop is the published arithmetic, its
fidelity knows itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from unlearn import UserError
from unlearn.attribution.losses import sample_losses
from unlearn.benchmark.architectures import (
    CONFIGURATIONS,
    SELECTION,
    multiply_images,
    seeded_model,
    seeded_training_set,
)
from unlearn.benchmark.meters import (
    anonymous_bytes,
    count_flops,
    hand_back_memory,
    measure_ceiling,
    metered,
)
from unlearn.benchmark.procedures import PROCEDURES, channels_last
from unlearn.benchmark.published import published_losses, published_step, stock_layers
from unlearn.benchmark.scaling import make_training_set
from unlearn.benchmark.workloads import describe_fidelity
from unlearn.commands import benchmark
from unlearn.models.pipelines import changed_weights, select_parameters
from unlearn.noise import batch_noise
from unlearn.runtime import programs

TINY = {
    "unet": {
        "sample_size": 4,
        "block_out_channels": (16, 32),
        "cross_attention_dim": 12,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
    },
    "scheduler": {},
    "tokens": 5,
}
SMALL = [
    "--device",
    "cpu",
    "--num_images",
    "7",
    "--num_queries",
    "3",
    "--num_exact",
    "2",
    "--batch_size",
    "8",
    "--time_samples",
    "2",
    "--gradient_batch_size",
    "8",
    "--unlearn_batch_size",
    "4",
    "--unlearn_grad_accum_steps",
    "2",
    "--fisher_samples",
    "10",
]


@pytest.fixture(autouse=True)
def fast_ceiling(monkeypatch):
    """A ceiling from small matrices: the speed of this machine is not what is tested."""
    monkeypatch.setattr(
        "unlearn.benchmark.workloads.measure_ceiling",
        lambda device, precision: measure_ceiling(device, precision, 32, 0),
    )


@pytest.fixture
def tiny(monkeypatch):
    """The name of an architecture of a few thousand weights."""
    monkeypatch.setitem(CONFIGURATIONS, "mscoco", TINY)
    return "mscoco"


def read_rows(path):
    """Rows by procedure, of which every number must be finite."""
    report = json.loads(
        path.read_text(), parse_constant=lambda constant: pytest.fail(f"{path} holds {constant}")
    )
    return {row["procedure"]: row for row in report["rows"]}, report


@pytest.mark.slow
def test_every_procedure_of_a_seeded_model_ends_in_a_row_of_finite_numbers(tiny, tmp_path, capsys):
    names = [name for name in PROCEDURES if name not in ("exact-tf32", "exact-compiled")]
    path = tmp_path / "tiny.json"
    benchmark.main(
        [
            "--architecture",
            tiny,
            "--output",
            str(path),
            *SMALL,
            "--procedures",
            *names,
            "--scaling",
            "6",
            "9",
        ]
    )
    rows, report = read_rows(path)
    assert list(rows) == names
    for row in rows.values():
        assert "failed" not in row["note"]
        assert (
            row["samples_per_second"] > 0
            and row["flops_per_sample"] > 0
            and row["share_of_ceiling"] > 0
        )
        assert list(row["fidelity"]) == ["20%"] and -1 <= row["fidelity"]["20%"]["spearman"] <= 1
    itself = rows["exact-fp32"]["fidelity"]["20%"]
    assert itself["spearman"] == pytest.approx(1) and itself["in_top"] == itself["top"] == 1
    assert (
        rows["published"]["fidelity"]["20%"]["spearman"] > 0.9
        and rows["published"]["load_seconds"] > 0
    )
    assert (
        "times the speed" in rows["exact-channels-last"]["note"]
        and rows["exact-fp32"]["note"] == ""
    )
    assert (
        rows["gradient-fp32"]["queries_a_sweep"] == 3
        and len(rows["gradient-fp32"]["sweep_seconds"]) == 1
    )
    assert [(row["num_images"], row["timesteps"]) for row in report["scaling"]] == [
        (6, 1),
        (9, 1),
        (6, 2),
        (6, 5),
        (6, 10),
    ]
    assert all(
        row[kind]["seconds"] > 0 for row in report["scaling"] for kind in ("exact", "gradient")
    )
    assert (
        report["settings"]["num_images"] == 7
        and report["circumstances"]["torch"] == torch.__version__
    )
    printed = capsys.readouterr().out
    assert (
        "| exact-fp32 " in printed
        and "Spearman 20%" in printed
        and "gradient us a sample" in printed
    )


def test_a_data_root_with_a_trained_model_is_measured_at_its_natural_step_too(root, tmp_path):
    fixture = Path(__file__).parent / "parity/fixture/sd-tiny"
    (root / "dataset.json").write_text(json.dumps({"unlearn_lr": 0.01, "num_train": 60}))
    benchmark.main(
        [
            "--dataroot",
            str(root),
            "--sd_version",
            str(fixture),
            "--output",
            str(tmp_path / "mini.json"),
            *SMALL,
            "--procedures",
            "exact-fp32",
            "gradient-fp32",
        ]
    )
    rows, _ = read_rows(tmp_path / "mini.json")
    assert list(rows["gradient-fp32"]["fidelity"]) == ["20%", "natural"]


def test_the_published_loop_is_what_diffusers_gives_for_noise_drawn_a_batch():
    model = seeded_model(TINY, "cpu", 0)
    images = seeded_training_set("tiny", TINY, 5, 0)
    grid = [0, 500]
    unet = UNet2DConditionModel(**TINY["unet"]).eval()
    unet.load_state_dict(model.denoiser.state_dict())
    with stock_layers(model.denoiser):
        losses = published_losses(model.denoiser, model.alpha_bars, images, grid, batch_size=6)
    rows = [(view, image) for view in range(2) for image in range(5)]
    for index in range(4):
        batch = rows[3 * index : 3 * index + 3]
        noise = batch_noise(index, (2 * len(batch), 4, 4, 4), "cpu")
        for place, (view, image) in enumerate(batch):
            latents = torch.tensor(images.latents[view, image])
            embedding = torch.tensor(images.embeddings[image])
            errors = []
            for slot, timestep in enumerate(grid):
                normals, alpha_bar = noise[2 * place + slot], model.alpha_bars[timestep]
                noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * normals
                with torch.no_grad():
                    prediction = unet(
                        noisy[None], timestep, encoder_hidden_states=embedding
                    ).sample[0]
                errors.append(float((prediction - normals).square().mean()))
            assert losses[3 * index + place] == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_published_step_and_another_memory_format_leave_the_model_as_it_was():
    model, images = seeded_model(TINY, "cpu", 0), seeded_training_set("tiny", TINY, 1, 0)
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    processors = dict(model.denoiser.attn_processors)
    parameters = select_parameters(model.denoiser, SELECTION)
    fisher = {name: torch.ones_like(value) for name, value in parameters.items()}
    with stock_layers(model.denoiser), channels_last(model.denoiser):
        published_step(
            model.denoiser,
            parameters,
            model.alpha_bars,
            torch.tensor(images.latents[0, 0]),
            torch.tensor(images.embeddings[0, 0]),
            fisher,
            1.0,
            3,
            2,
        )
    assert all(
        torch.equal(value, before[name]) and value.is_contiguous()
        for name, value in model.denoiser.state_dict().items()
    )
    assert model.denoiser.attn_processors == processors and not any(
        value.requires_grad for value in model.denoiser.parameters()
    )


def test_the_text_of_a_seeded_model_has_an_effect_on_the_loss():
    """Otherwise its fidelity would be that of rounding."""
    model, images = seeded_model(TINY, "cpu", 0), seeded_training_set("tiny", TINY, 2, 0)
    parameters = select_parameters(model.denoiser, SELECTION)
    latents, embeddings = torch.tensor(images.latents[0]), torch.tensor(images.embeddings[:, 0])
    samples = [
        latents,
        torch.zeros_like(latents),
        torch.tensor([100, 500]),
        {"embeddings": embeddings},
    ]
    with torch.no_grad():
        before = sample_losses(model, *samples)
        with changed_weights(
            model.denoiser, {name: 0.2 * value.detach() for name, value in parameters.items()}
        ):
            assert ((sample_losses(model, *samples) - before).abs() / before > 1e-5).all()


def test_the_configurations_are_those_of_the_two_models():
    with torch.device("meta"):
        unets = {
            name: UNet2DConditionModel(**configuration["unet"])
            for name, configuration in CONFIGURATIONS.items()
        }
    counts = {
        name: sum(value.numel() for value in unet.parameters()) for name, unet in unets.items()
    }
    assert counts["sd14"] == 859_520_964
    selected = {
        name: sum(value.numel() * 4 for value in select_parameters(unet, SELECTION).values())
        for name, unet in unets.items()
    }
    assert 76e6 < selected["sd14"] < 78e6


def test_fidelity_counts_shared_top_images_and_ranks():
    scores = np.random.default_rng(0).standard_normal((2, 50))
    size = np.median(abs(scores))
    assert describe_fidelity(scores, scores) == {
        "spearman": pytest.approx(1),
        "top": 10,
        "in_top": 10,
        "median_loss_change": size,
    }
    assert describe_fidelity(-scores, scores) == {
        "spearman": pytest.approx(-1),
        "top": 10,
        "in_top": 0,
        "median_loss_change": size,
    }


def test_operations_are_counted_forward_and_backward_attention_too():
    first, second = torch.ones(3, 5, requires_grad=True), torch.ones(5, 7)
    assert count_flops(lambda: first @ second) == 2 * 3 * 5 * 7
    assert count_flops(lambda: (first @ second).sum().backward()) == 2 * 2 * 3 * 5 * 7
    queries = torch.ones(1, 1, 4, 8)
    assert (
        count_flops(
            lambda: torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)
        )
        == 2 * 2 * 4 * 4 * 8
    )


@pytest.mark.skipif(anonymous_bytes() is None, reason="only Linux tells")
def test_the_peak_of_memory_is_seen_though_it_is_gone_at_the_end():
    hand_back_memory()
    before = anonymous_bytes()
    with metered(torch.device("cpu")) as costs:
        block = np.ones(8_000_000)
        programs.time.sleep(0.1)
        del block
    assert costs["host_bytes"] > before + 40e6 and costs["seconds"] > 0.1


def test_a_made_up_training_set_holds_its_latents_on_disk(tmp_path):
    images = make_training_set(
        2500, (4, 2, 2), np.ones((3, 5), np.float32), tmp_path / "latents.npy"
    )
    assert (
        len(set(images.ids)) == 2500
        and isinstance(images.latents, np.memmap)
        and images.embeddings.strides[0] == 0
    )
    assert abs(images.latents[1, 2499]).min() > 0


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--procedures", "magic"], "--procedures magic: expected some of published"),
        (
            ["--procedures", "exact-tf32"],
            "--procedures exact-tf32: there is no TensorFloat-32 on a CPU",
        ),
        (["--relative_change", "-0.2"], "--relative_change -0.2: expected positive numbers"),
        (["--relative_change", "nan"], "--relative_change nan: expected positive numbers"),
        (
            ["--time_samples", "9"],
            "--batch_size 8: the published procedure needs at least the 9 timesteps of an image",
        ),
        (["--num_queries", "0"], "--num_queries 0: expected a positive whole number"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(tiny, flags, text, tmp_path):
    with pytest.raises(UserError, match=text):
        benchmark.main(
            ["--architecture", tiny, "--output", str(tmp_path / "out.json"), *SMALL, *flags]
        )


@pytest.mark.slow
def test_the_more_draws_the_nearer_to_very_many_and_ours_are_nearer(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("unlearn.benchmark.draws.REFERENCE_DRAWS", 2000)
    path = tmp_path / "tiny.json"
    benchmark.main(
        [
            "--architecture",
            tiny,
            "--output",
            str(path),
            *SMALL,
            "--procedures",
            "exact-fp32",
            "--draws",
            "8",
            "400",
        ]
    )
    few, many = read_rows(path)[1]["draws"]
    assert (few["draws"], many["draws"]) == (8, 400) and few["ours"]["cosine"] < many["ours"][
        "cosine"
    ] < 1
    assert (
        many["ours"]["relative_error"]
        < many["published"]["relative_error"]
        < few["published"]["relative_error"]
    )
    assert "cosine, published draws" in capsys.readouterr().out


def test_more_images_than_there_are_are_made_up_under_ids_of_their_own(training_set):
    more = multiply_images(training_set, 75, seed=0)
    assert (
        len(more)
        == len(set(more.ids))
        == len(more.captions)
        == len(more.paths)
        == more.latents.shape[1]
        == len(more.embeddings)
        == 75
    )
    assert (
        more.ids[:60] == training_set.ids and (more.latents[:, :60] == training_set.latents).all()
    )
    assert (
        multiply_images(training_set, 75, seed=0).latents == more.latents
    ).all() and np.isfinite(more.latents).all()


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="invalid choice: 'magic'"):
        benchmark.main(["--architecture", "magic"])


def test_a_procedure_that_fails_says_so_in_its_row_and_the_others_go_on(
    tiny, tmp_path, monkeypatch
):
    def fail(bench):
        raise RuntimeError("no compiler here")

    monkeypatch.setitem(PROCEDURES, "exact-compiled", fail)
    path = tmp_path / "out.json"
    benchmark.main(
        [
            "--architecture",
            tiny,
            "--output",
            str(path),
            *SMALL,
            "--procedures",
            "exact-compiled",
            "exact-fp32",
        ]
    )
    rows, _ = read_rows(path)
    assert rows["exact-compiled"]["note"] == "failed: RuntimeError: no compiler here"
    assert math.isfinite(rows["exact-fp32"]["score_seconds"])
