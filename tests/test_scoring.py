"""Midpoint, gradient and index scoring: closed forms, invariances, resuming, and what the user is
told."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PARITY

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution import draws, losses, shortlist, sweeps
from unlearn.attribution.compression import BYTES_A_VIEW, fit, multiply, pack, row_type
from unlearn.attribution.derivatives import (
    gradient_dots,
    probe_signs,
    second_order_dots,
    text_gradients,
)
from unlearn.attribution.losses import sample_losses
from unlearn.attribution.scoring import audit_seed
from unlearn.attribution.shortlist import choose_images, estimate_recall, split_outsiders
from unlearn.attribution.sweeps import Sweep
from unlearn.commands import index as index_command
from unlearn.commands import preparation
from unlearn.models.pipelines import changed_weights, select_parameters
from unlearn.report.results import describe_recall
from unlearn.storage.artifacts import write_bytes
from unlearn.storage.reading import read_json, read_tensors
from unlearn.storage.records import record_path, write_record

GRID = [0, 250, 500, 750]
SOME = ["--laion_subset_size", "40"]  # two chunks
FLAGS = [
    *SOME,
    "--loss_time_samples",
    "2",
    "--unlearn_steps",
    "1",
    "--unlearn_grad_accum_steps",
    "1",
    "--damping",
    "0.1",
    "--num_train",
    "60",
    "--unlearn_lr",
    "0.00001",
]


@pytest.fixture(scope="module")
def dozen(training_set):
    """Twelve images."""
    return training_set.first(12)


@pytest.fixture(scope="module")
def changes(model):
    """Two weight changes of K and V of five per cent."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: 0.05
            * value.norm()
            * torch.nn.functional.normalize(
                torch.randn(value.shape, generator=generator).flatten(), dim=0
            ).reshape(value.shape)
            for name, value in select_parameters(model.denoiser, "cross-attn-kv").items()
        }
        for _ in range(2)
    ]


def score(model, images, folder, measure, batch_size=20):
    """Values of a measure, [24, ...]."""
    folder.mkdir()
    return Sweep(images, GRID, batch_size).run(model, folder, "", measure)


def samples_of(dozen, count=3):
    """Some samples, one timestep each, as `losses.sample_losses` takes them."""
    latents = torch.from_numpy(np.array(dozen.latents[0, :count], np.float32))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    return (
        latents,
        noise,
        torch.tensor([100, 500, 900])[:count],
        {"embeddings": torch.from_numpy(np.array(dozen.embeddings[:count, 0], np.float32))},
    )


def test_text_gradients_equal_autograd_of_each_text(model, dozen):
    latents, noise, timesteps, texts = samples_of(dozen)
    parameters = select_parameters(model.denoiser, "cross-attn-kv")
    latents = latents.repeat_interleave(2, 0)
    noise = torch.cat([noise, -noise])
    timesteps = timesteps.repeat_interleave(2)
    found = dict(text_gradients(model, latents, noise, timesteps, texts))
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for text in range(3):
            own = slice(2 * text, 2 * text + 2)
            one = {"embeddings": texts["embeddings"][text : text + 1]}
            loss = sample_losses(model, latents[own], noise[own], timesteps[own], one).sum()
            for name, expected in zip(
                parameters, torch.autograd.grad(loss, list(parameters.values()))
            ):
                torch.testing.assert_close(
                    found[name][text], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
                )
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def test_derivatives_are_the_slope_of_the_loss_along_a_change(model, dozen, changes, tmp_path):
    slope, step = score(model, dozen, tmp_path / "slope", gradient_dots(changes[:1]))[:, 0], 1e-2
    sides = []
    for sign in (step, -step):
        with changed_weights(
            model.denoiser, {name: sign * delta for name, delta in changes[0].items()}
        ):
            sides.append(
                score(model, dozen, tmp_path / str(sign), losses.loss_sums).astype(np.float64)
            )
    np.testing.assert_allclose(
        slope, (sides[0] - sides[1]) / (2 * step), atol=2e-2 * np.abs(slope).max()
    )


def test_the_midpoint_is_nearer_to_the_exact_change_than_the_first_order(
    model, dozen, changes, tmp_path
):
    large = {name: 10 * delta for name, delta in changes[0].items()}
    before = score(model, dozen, tmp_path / "before", losses.loss_sums).astype(np.float64)
    with changed_weights(model.denoiser, large):
        exact = score(model, dozen, tmp_path / "after", losses.loss_sums) - before
    with changed_weights(model.denoiser, {name: delta / 2 for name, delta in large.items()}):
        midpoint = score(model, dozen, tmp_path / "midpoint", gradient_dots([large]))[:, 0]
    first = score(model, dozen, tmp_path / "first", gradient_dots([large]))[:, 0]
    errors = [np.linalg.norm(found - exact) / np.linalg.norm(exact) for found in (midpoint, first)]
    assert errors[0] < 0.05 and errors[0] < errors[1] / 5


def test_the_second_order_is_the_gauss_newton_form(model, dozen, changes):
    """Many probes come near || J D ||^2, by a difference of predictions in float64's reach."""
    latents, noise, timesteps, embeddings = samples_of(dozen)
    small = {name: 1e-2 * delta for name, delta in changes[0].items()}
    predictions = []
    for sign in (1, -1):
        with (
            changed_weights(model.denoiser, {name: sign * delta for name, delta in small.items()}),
            torch.no_grad(),
        ):
            predictions.append(
                model.predict(
                    model.diffuse(latents, noise, timesteps), timesteps, embeddings
                ).double()
            )
    expected = (((predictions[0] - predictions[1]) / 2e-2) ** 2).mean(dim=(1, 2, 3))
    first = gradient_dots(changes[:1])(model, latents, noise, timesteps, embeddings)[:, 0]
    found = (
        second_order_dots(changes[:1], num_probes=400)(
            model, latents, noise, timesteps, embeddings
        )[:, 0]
        - first
    )
    torch.testing.assert_close(
        found, expected, rtol=0.25, atol=0
    )  # 400 probes: 7 % standard error each


def test_probes_are_balanced_signs_that_neither_batch_nor_order_changes():
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    one, two = probe_signs(noise, 2)
    assert set(one.unique().tolist()) == {-1.0, 1.0} and not torch.equal(one, two)
    assert torch.equal(next(probe_signs(noise[2:3], 1))[0], one[2])
    assert abs(float((one * noise.sign()).mean())) < 0.1


@pytest.fixture(scope="module")
def uphill(model, dozen, changes):
    """Two weight changes of five per cent along gradients of images' losses, as unlearning makes
    them. Along a random one a score is a small rest of large terms, and tells rounding alone."""
    size = {name: value.norm() for name, value in changes[0].items()}
    gradients = dict(text_gradients(model, *samples_of(dozen)))
    return [
        {name: size[name] * gradients[name][text] / gradients[name][text].norm() for name in size}
        for text in range(2)
    ]


@pytest.mark.parametrize("measure_of", [gradient_dots, second_order_dots])
@pytest.mark.parametrize("batch_size", [1, 3, 200])
def test_the_batch_size_changes_derivatives_by_less_than_1e_6(
    model, dozen, uphill, tmp_path, measure_of, batch_size
):
    reference = score(model, dozen, tmp_path / "reference", measure_of(uphill))
    found = score(model, dozen, tmp_path / "found", measure_of(uphill), batch_size)
    assert (np.abs(found - reference).max(axis=0) <= 1e-6 * np.abs(reference).max(axis=0)).all()


def test_a_full_memory_that_has_made_passes_save_it_changes_no_derivative(
    model, dozen, changes, tmp_path
):
    """Several backward passes go through one graph, and each computes again."""
    expected = score(model, dozen.first(3), tmp_path / "whole", second_order_dots(changes))
    was_saving = not model.save_memory()
    try:
        found = score(model, dozen.first(3), tmp_path / "saved", second_order_dots(changes))
    finally:
        if not was_saving:
            model.denoiser.disable_gradient_checkpointing()
    np.testing.assert_array_equal(found, expected)


def test_queries_scored_together_get_the_scores_of_each_alone(model, dozen, changes, tmp_path):
    together = score(model, dozen, tmp_path / "both", second_order_dots(changes))
    for number, change in enumerate(changes):
        alone = score(model, dozen, tmp_path / str(number), second_order_dots([change]))[:, 0]
        np.testing.assert_allclose(together[:, number], alone, atol=1e-6 * np.abs(alone).max())


def fitted(matrices, roots):
    """The Compression of gradients {name: [n, out, in]}."""

    def visit_gradients(visit):
        for name, gradients in matrices.items():
            visit(name, gradients)

    return fit(visit_gradients, roots)


def test_what_fits_into_16_kb_is_kept_whole():
    """Two small matrices: nothing is left out, and the inner product is the gradients' own but for
    8 bits."""
    generator = torch.Generator().manual_seed(0)
    matrices = {
        name: torch.randn(50, *shape, generator=generator)
        for name, shape in (("a", (8, 12)), ("b", (5, 6)))
    }
    roots = {
        name: torch.rand(value.shape[1:], generator=generator) + 0.5
        for name, value in matrices.items()
    }
    compression = fitted(matrices, roots)
    assert compression.size == 8 * 12 + 5 * 6
    entries = compression.keep(matrices.items(), torch.div, torch.div)
    change = {
        name: torch.randn(value.shape[1:], generator=generator) for name, value in matrices.items()
    }
    query = compression.read_change(change)[:, None].numpy()
    expected = sum((matrices[name] * change[name]).sum(dim=(1, 2)) for name in matrices).numpy()
    np.testing.assert_allclose((entries.numpy() @ query)[:, 0], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        multiply(pack(entries.numpy()), query)[:, 0], expected, atol=0.05 * np.abs(expected).max()
    )


def test_a_stored_view_takes_at_most_16_kb_and_keeps_the_largest_entries():
    generator = torch.Generator().manual_seed(0)
    weak = 1e-3 * torch.randn(20, 200, 100, generator=generator)
    strong = torch.randn(20, 100, 90, generator=generator)
    compression = fitted(
        {"weak": weak, "strong": strong},
        {"weak": torch.ones(200, 100), "strong": torch.ones(100, 90)},
    )
    assert row_type(compression.size).itemsize == BYTES_A_VIEW
    assert len(compression.tensors["strong.kept"]) == 100 * 90


ERRORS = {  # estimates of 2,000 normal scores, or scores of such estimates: (scores, estimates)
    "alike": lambda first, second: (first, first + 0.5 * second),
    "alike about the estimate": lambda first, second: (first + 0.5 * second, first),
    "growing with the estimate": lambda first, second: (
        first + 0.3 * np.exp(0.7 * first) * second,
        first,
    ),
    "growing with the score": lambda first, second: (
        np.exp(first),
        np.exp(first) * (1 + 0.25 * second),
    ),
}


@pytest.mark.parametrize("errors", ERRORS)
def test_the_audit_tells_what_a_shortlist_misses_and_rather_too_much(errors, monkeypatch):
    """Over 30 worlds the share that it says is at most the true one and near it, and its lower
    bound holds."""
    monkeypatch.setattr(shortlist, "DRAWS", 60)
    said, low, true = [], [], []
    for seed in range(30):
        exact, estimates = ERRORS[errors](*np.random.default_rng(seed).standard_normal((2, 2000)))
        best, audit = choose_images(estimates, 200, 100, seed)
        assert (
            len(np.intersect1d(best, audit)) == 0
            and len(best) == 200
            and len(set(audit.tolist())) == 100
        )
        share, bound = estimate_recall(estimates, exact, best, audit, 100, seed)
        (
            said.append(share),
            low.append(bound),
            true.append(np.isin(np.argsort(-exact)[:100], best).mean()),
        )
    assert -0.06 < np.mean(said) - np.mean(true) < 0.01 and 0.5 < np.mean(true) < 0.97
    assert np.mean(np.array(low) <= true) >= 0.85


def test_no_more_is_missed_than_the_best_there_are():
    """A shortlist that holds 49 of the best 100, by estimates that say little: never more than 100
    are missed."""
    exact, noise = np.random.default_rng(0).standard_normal((2, 2000))
    estimates = exact + 2 * noise
    best, audit = choose_images(estimates, 400, 100, 0)
    share, low = estimate_recall(estimates, exact, best, audit, 100)
    true = np.isin(np.argsort(-exact)[:100], best).mean()
    assert 0 <= low <= share <= 1 and abs(share - true) < 0.2 and true < 0.7


def test_an_audit_of_all_others_gives_the_true_share():
    exact, noise = np.random.default_rng(0).standard_normal((2, 60))
    estimates = exact + noise
    for num_audited in (40, 100):
        best, audit = choose_images(estimates, 20, num_audited, 0)
        assert len(audit) == 40
        true = np.isin(np.argsort(-exact)[:10], best).mean()
        assert estimate_recall(estimates, exact, best, audit, 10) == (true, true)


@pytest.mark.parametrize(
    "count, num_audited", [(7, 0), (30, 5), (101, 100), (300, 100), (100_000, 100), (5000, 37)]
)
def test_an_audit_takes_more_near_the_cut_and_as_many_as_asked(count, num_audited):
    bounds, numbers = split_outsiders(count, num_audited)
    sizes = np.diff(bounds)
    assert (
        bounds[0] == 0
        and bounds[-1] == count
        and numbers.sum() == num_audited
        and (sizes >= numbers).all()
    )
    assert num_audited < 30 or count < 3 * num_audited or sizes[0] < sizes[-1] / 4


def test_each_query_audits_images_of_its_own():
    estimates = np.arange(1000.0)
    audits = [
        choose_images(estimates, 100, 50, audit_seed(0, query))[1].tolist()
        for query in ("one", "two", "one")
    ]
    assert audits[0] == audits[2] != audits[1]
    assert audit_seed(1, "one") != audit_seed(0, "one")


def test_a_shortlist_of_everything_misses_nothing_and_a_small_audit_tells_nothing():
    assert estimate_recall(np.arange(5.0), np.arange(5.0), np.arange(5), np.arange(0), 3) == (
        1.0,
        1.0,
    )
    assert np.isnan(
        estimate_recall(np.arange(50.0), np.arange(50.0), np.arange(40, 50), np.arange(9), 3)
    ).all()
    for count, is_bounded in (49, False), (50, True):
        estimates, rows = np.arange(500.0), np.arange(400, 500)
        audit = choose_images(estimates, 100, count, 0)[1]
        share, low = estimate_recall(estimates, estimates, rows, audit, 10)
        assert (
            share == 1
            and np.isnan(low) != is_bounded
            and ("no lower bound" in describe_recall(share, low, 10, count)) != is_bounded
        )
    assert (
        describe_recall(np.nan, np.nan, 3, 9)
        == "An audit of 9 others does not tell how many of the best 3 the shortlist misses: give "
        "--audit 100."
    )


@pytest.fixture
def prepared(flags):
    """Flags of a data root whose losses are cached; its results' folder."""
    compute_training_loss.main([*flags, *SOME, "--time_samples", "2"])
    return flags, Path(flags[flags.index("--result_dir") + 1])


def build(flags, output, *more):
    """Builds the indices of the miniature root's models."""
    shared = [
        value
        for flag, value in zip(flags[::2], flags[1::2])
        if flag != "--result_dir"
        for value in (flag, value)
    ]
    index_command.main(
        [*shared, *SOME, "--time_samples", "2", "--damping", "0.1", "--output", str(output), *more]
    )


def influences(folder):
    """{query: arrays} of every influence file below a folder."""
    return {
        path.parent.relative_to(folder).as_posix(): dict(np.load(path))
        for path in sorted(folder.rglob("influence.npz"))
    }


def rerun(flags, results, *more):
    """Ranks again from nothing; the influence files."""
    shutil.rmtree(results / "influence", ignore_errors=True)
    compute_influence.main([*flags, *FLAGS, *more])
    return influences(results / "influence")


def test_every_way_of_scoring_ranks_nearly_alike_and_leaves_no_chunks(prepared):
    flags, results = prepared
    exact = rerun(flags, results)
    for scoring in "midpoint", "gradient":
        found = rerun(flags, results, "--scoring", scoring)
        for query, arrays in found.items():
            assert np.corrcoef(arrays["influence"], exact[query]["influence"])[0, 1] > 0.9, (
                scoring,
                query,
            )
        assert not list(results.rglob(".*")), "chunks were left"
        record = read_json(next((results / "influence").rglob("laion_change.json")))
        assert record["identity"]["scoring"] == scoring


def first_task(folder):
    """A task file of the fixture's first query alone."""
    tasks = json.loads((PARITY / "fixture/tasks.json").read_text())[:1]
    (folder / "first.json").write_text(json.dumps(tasks))
    return str(folder / "first.json")


def test_derivatives_need_no_cached_losses(flags, tmp_path):
    flags[flags.index("--task_json") + 1] = first_task(tmp_path)
    few = ["--laion_subset_size", "8", "--precision", "bf16"]
    compute_influence.main([*flags, *FLAGS, "--scoring", "gradient", *few])
    assert influences(tmp_path / "results/influence")


@contextmanager
def stopped_after(count, monkeypatch):
    """Interrupts a sweep after some chunks."""
    chunks, score_rows = iter(range(count)), losses.score_rows

    def stop(*given):
        if next(chunks, None) is None:
            raise KeyboardInterrupt
        return score_rows(*given)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "score_rows", stop)
        yield


def test_gradient_scoring_that_was_killed_goes_on_to_the_same_bits(prepared, monkeypatch):
    flags, results = prepared
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (7,))
    expected = rerun(flags, results, "--scoring", "gradient")
    shutil.rmtree(results / "influence")
    with stopped_after(5, monkeypatch), pytest.raises(KeyboardInterrupt):
        compute_influence.main([*flags, *FLAGS, "--scoring", "gradient"])
    compute_influence.main([*flags, *FLAGS, "--scoring", "gradient"])
    for query, arrays in influences(results / "influence").items():
        np.testing.assert_array_equal(arrays["influence"], expected[query]["influence"])


def test_an_index_of_all_images_gives_the_exact_ranking(prepared, tmp_path):
    flags, results = prepared
    build(flags, tmp_path / "index")
    exact = rerun(flags, results)
    found = rerun(
        flags, results, "--index", str(tmp_path / "index"), "--shortlist", "40", "--audit", "0"
    )
    for query, arrays in found.items():
        np.testing.assert_allclose(
            arrays["influence"], exact[query]["influence"], rtol=1e-4, atol=1e-7
        )
        assert arrays["rescored"].all() and arrays["recall"] == 1


def test_a_shortlist_is_scored_exactly_and_the_others_are_estimated(prepared, tmp_path, capsys):
    flags, results = prepared
    build(flags, tmp_path / "index")
    exact = rerun(flags, results)
    capsys.readouterr()
    found = rerun(
        flags, results, "--index", str(tmp_path / "index"), "--shortlist", "10", "--audit", "12"
    )
    assert "the shortlist holds about" in capsys.readouterr().out
    audits = set()
    for query, arrays in found.items():
        audits.add(tuple(np.flatnonzero(arrays["rescored"])))
        num_exemplars = int(arrays["is_exemplar"].sum())
        assert (
            arrays["rescored"].sum() == num_exemplars + 22
            and arrays["rescored"][arrays["is_exemplar"]].all()
        )
        np.testing.assert_allclose(
            arrays["influence"][arrays["rescored"]],
            exact[query]["influence"][arrays["rescored"]],
            rtol=1e-4,
            atol=1e-7,
        )
        assert (
            arrays["expected_missed"] == pytest.approx(10 * (1 - arrays["recall"]))
            and 0 <= arrays["recall"] <= 1
        )
        assert np.isnan(arrays["recall_low"])  # of so few audited images
        rest = ~arrays["rescored"]
        assert np.corrcoef(arrays["influence"][rest], exact[query]["influence"][rest])[0, 1] > 0.5


def test_an_index_that_was_killed_goes_on_to_the_same_bits(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(draws.chunk_rows, "__defaults__", (7,))
    build(flags, tmp_path / "whole")
    with stopped_after(3, monkeypatch), pytest.raises(KeyboardInterrupt):
        build(flags, tmp_path / "parts")
    build(flags, tmp_path / "parts")
    listings = {
        path.relative_to(tmp_path / "whole"): path.read_text()
        for path in (tmp_path / "whole").rglob("shards.txt")
    }
    assert listings
    for path, text in listings.items():
        assert (tmp_path / "parts" / path).read_text() == text


def refused(capsys, argv):
    """The one line with which a run is refused."""
    with pytest.raises(UserError) as error:
        compute_influence.main(argv)
    return str(error.value)


@pytest.mark.parametrize(
    "given, expected",
    [
        (
            ["--precision", "bf16"],
            "--precision bf16: the difference of two losses is lost in its rounding; give "
            "--scoring midpoint or gradient",
        ),
        (
            ["--shortlist", "5"],
            "--shortlist: means nothing without --index; build one: python -m unlearn index",
        ),
        (["--audit", "5"], "--audit: means nothing without --index"),
        (["--shortlist", "0", "--index", "x"], "--shortlist 0: expected a positive whole number"),
        (
            ["--index", "x", "--scoring", "gradient"],
            "--index: ranks all images by their gradients already",
        ),
        (
            ["--scoring", "midpoint", "--compat", "abu"],
            "--compat abu: the published program knows --scoring exact only, found midpoint",
        ),
        (
            ["--scoring", "gradient", "--weight_selection", "all"],
            "--scoring gradient: takes the derivative through keys and values",
        ),
    ],
)
def test_ways_of_scoring_that_do_not_go_together_are_refused_before_a_model_is_loaded(
    flags, capsys, monkeypatch, given, expected
):
    monkeypatch.setattr(preparation, "load_model", None)
    assert refused(capsys, [*flags, *FLAGS, *given]).startswith(expected)


def test_an_index_that_is_missing_damaged_or_of_another_grid_is_refused_with_the_command(
    prepared, tmp_path, capsys
):
    flags, results = prepared
    given = [*flags, *FLAGS, "--index", str(tmp_path / "index"), "--shortlist", "10"]
    assert "build it: python -m unlearn index --task_json" in refused(capsys, given)
    build(flags, tmp_path / "index")
    given[given.index("--loss_time_samples") + 1] = "4"
    compute_training_loss.main([*flags, *SOME, "--time_samples", "4", "--overwrite"])
    assert (
        "timesteps is [0, 500], expected [0, 250, 500, 750] (timesteps of the noise); "
        "build it with the same flags" in refused(capsys, given)
    )
    given[given.index("--loss_time_samples") + 1] = "2"
    compute_training_loss.main([*flags, *SOME, "--time_samples", "2", "--overwrite"])
    shard = next((tmp_path / "index").rglob("shards-*/*.npy"))
    built = shard.read_bytes()
    shard.write_bytes(built[:-1] + bytes([built[-1] ^ 1]))
    assert "is not the shard that was built (damaged or replaced); delete it and run" in refused(
        capsys, given
    )
    shard.unlink()
    build(flags, tmp_path / "index")
    assert shard.read_bytes() == built
    listing = next((tmp_path / "index").rglob("shards.txt"))
    write_record(
        listing,
        read_json(record_path(listing))["identity"],
        content=write_bytes(
            listing, listing.read_bytes().replace(b"  shards-", b"  ../../shards-", 1)
        ),
    )
    assert "shards.txt: line 1: expected a hash and the name of a shard" in refused(capsys, given)


def test_bfloat16_unlearns_along_the_same_direction(flags):
    results, changes = Path(flags[flags.index("--result_dir") + 1]), []
    for precision in "fp32", "bf16":
        rerun(
            flags,
            results,
            "--scoring",
            "midpoint",
            "--precision",
            precision,
            "--laion_subset_size",
            "1",
        )
        changes.append(
            read_tensors(next((results / "influence").rglob("weight_change.safetensors")))
        )
    one, two = (
        torch.cat([change[name].flatten() for name in sorted(change)]) for change in changes
    )
    assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.99 and not torch.equal(
        one, two
    )
