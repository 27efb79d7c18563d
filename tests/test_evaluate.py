"""AbC metrics: closed forms against enumeration, baselines against hand-made cases, the command end
to end."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compute_influence
import compute_training_loss
from unlearn import UserError
from unlearn.attribution.influence import best_view, rank_images
from unlearn.baselines.similarity import (
    cosine_scores,
    encode_blocks,
    feature_encoder,
    latent_blocks,
    latent_encoder,
    mean_features,
    pixel_encoder,
    score_queries,
    word_scores,
)
from unlearn.commands.evaluate import main
from unlearn.commands.evaluate_baselines import measure, measure_words
from unlearn.datasets.encoders import load_image, transform_image
from unlearn.datasets.tasks import Task
from unlearn.datasets.training_sets import open_training_set
from unlearn.evaluation import metrics
from unlearn.evaluation.exemplars import group_queries, kind_of
from unlearn.models.pipelines import load_model
from unlearn.report.results import median_change
from unlearn.storage.records import write_record

FIXTURE = Path(__file__).parent / "parity/fixture"
NUM_EXEMPLARS, NUM_TRAINING = 5, 60
RESULTS = ("tiny/gpt/blob/samples/00000.png", "tiny/gpt/blob/samples/00001.png")


def make_task(test_case="test_tiny", train_prompt="<new1> blob"):
    return Task("synth/0.png", "a blob", test_case, 0, "models/blob", train_prompt, None, ())


def save_influence(result_dir, name, influence, num_training=NUM_TRAINING, rank=None, **shown):
    """An influence file and its record, as compute_influence.py leaves them."""
    path = Path(result_dir) / "influence" / name / "influence.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"exemplar/tiny/{i}.png" for i in range(NUM_EXEMPLARS)] + [
        f"laion/{i:06d}" for i in range(num_training)
    ]
    np.savez(
        path,
        ids=np.array(ids),
        influence=influence,
        is_exemplar=np.arange(len(ids)) < NUM_EXEMPLARS,
        rank=rank_images(influence) if rank is None else rank,
        **shown,
    )
    write_record(path, {"query": name})
    return path


def influence_with_ranks(ranks, num_training=NUM_TRAINING):
    """Scores under which the exemplars stand at these ranks."""
    influence = np.empty(NUM_EXEMPLARS + num_training)
    places = np.arange(1, len(influence) + 1)
    influence[:NUM_EXEMPLARS] = -np.array(ranks)
    influence[NUM_EXEMPLARS:] = -places[~np.isin(places, ranks)]
    return influence


@pytest.fixture
def arguments(tmp_path):
    """Command line of a finished run on the fixture: query 0 ranked perfectly, query 1 with
    exemplars at 1, 4, 7, 20, 65."""
    save_influence(tmp_path, RESULTS[0], influence_with_ranks([1, 2, 3, 4, 5]))
    save_influence(tmp_path, RESULTS[1], influence_with_ranks([1, 4, 7, 20, 65]))
    return [
        "--task_json",
        f"{FIXTURE}/tasks.json",
        "--dataroot",
        f"{FIXTURE}/abc",
        "--sd_version",
        f"{FIXTURE}/sd-tiny",
        "--result_dir",
        str(tmp_path),
        "--device",
        "cpu",
        "--vae_batch_size",
        "4",
    ]


@pytest.mark.parametrize("num_exemplars, num_candidates", [(1, 1), (1, 6), (2, 5), (3, 7), (4, 4)])
def test_expected_metrics_under_chance_equal_their_mean_over_all_orders(
    num_exemplars, num_candidates
):
    ranks = [
        np.array(places)
        for places in itertools.combinations(range(1, num_candidates + 1), num_exemplars)
    ]
    assert metrics.expected_average_precision(num_exemplars, num_candidates) == pytest.approx(
        np.mean([metrics.average_precision(each) for each in ranks]), rel=1e-12
    )
    for k in range(1, num_candidates + 3):
        recalls = [metrics.recall(each, k) for each in ranks]
        assert metrics.expected_recall(num_candidates, k) == pytest.approx(
            np.mean(recalls), rel=1e-12
        )


def test_average_precision_and_recall_equal_hand_cases():
    ranks = metrics.exemplar_ranks(
        np.array([3, 0, 2, 4, 1]), np.array([True, True, False, False, False])
    )
    assert ranks.tolist() == [2, 5]
    assert metrics.average_precision(ranks) == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert [metrics.recall(ranks, k) for k in (1, 2, 4, 5)] == [0, 0.5, 0.5, 1]


@pytest.mark.parametrize("num_exemplars", [1, 5, 7, 120])
def test_a_perfect_ranking_reaches_map_1_and_the_highest_possible_recall(num_exemplars):
    perfect = metrics.query_metrics(np.arange(1, num_exemplars + 1))
    np.testing.assert_allclose(perfect, metrics.highest_metrics(num_exemplars))
    assert perfect[-1] == 1 and metrics.highest_recall(7, 5) == pytest.approx(5 / 7)


def test_paired_statistics_equal_numpy_by_hand():
    ours, other = np.array([0.5, 0.9, 0.4, 0.8]), np.array([0.1, 0.7, 0.5, 0.2])
    error = np.sqrt(np.sum(((ours - other) - 0.275) ** 2) / 3) / 2
    mean, found, p = metrics.compare_paired(ours, other)
    assert (mean, found) == pytest.approx((0.275, error)) and p == pytest.approx(
        metrics.student_p(0.275 / error, 3)
    )
    assert metrics.mean_and_error(ours) == pytest.approx(
        (0.65, np.sqrt((0.15**2 + 0.25**2 + 0.25**2 + 0.15**2) / 3) / 2)
    )


def test_p_values_and_quantiles_are_those_of_students_t():
    for ratio in 0.0, 0.3, -2.0, 40.0:  # closed forms of 1 and 2 degrees of freedom
        assert metrics.student_p(ratio, 1) == pytest.approx(
            1 - 2 / np.pi * np.arctan(abs(ratio)), rel=1e-9
        )
        assert metrics.student_p(ratio, 2) == pytest.approx(
            1 - abs(ratio) / np.sqrt(2 + ratio**2), rel=1e-9
        )
    table = {4: 2.776, 9: 2.262, 59: 2.001, 1000: 1.962}  # of every textbook, 95 %
    assert {freedom: round(metrics.student_quantile(freedom), 3) for freedom in table} == table
    assert metrics.student_p(4.52680194833706, 4) == pytest.approx(
        0.0106, abs=1e-4
    )  # 4.5 standard errors of five queries
    assert [metrics.format_p(p) for p in (0.0106, 1e-9)] == ["0.011", "< 0.001"]


def test_queries_of_one_model_count_as_one_where_models_are_the_unit():
    ours, models = np.array([1.0, 3, 4, 6, 0, 4]), np.array(list("aabbcc"))
    assert metrics.compare_by_model(ours, np.zeros(6), models) == pytest.approx(
        metrics.compare_paired([2, 5, 2], [0, 0, 0])[2]
    )
    assert np.isnan(
        [
            metrics.compare_by_model(ours, np.zeros(6), np.array(names))
            for names in (list("abcdef"), list("aaaaaa"))
        ]
    ).all()


def test_the_median_change_of_training_images_is_of_the_mean_of_their_views_which_noise_does_not_raise():
    assert median_change(np.array([1.0, -4, 2, -1, 2, 9])) == 0
    noise = np.random.default_rng(0).normal(size=2000)
    assert abs(median_change(noise)) < 0.1 < 0.4 < np.median(best_view(noise))


def test_a_single_query_has_no_standard_error_and_prints_none():
    mean, error, p = metrics.compare_paired([0.5], [0.25])
    assert (
        mean == 0.25
        and np.isnan([error, p]).all()
        and metrics.format_p(p) == ""
        and metrics.format_mean(mean, error) == "0.250"
    )


def test_ties_of_an_exemplar_with_another_image_are_seen():
    is_exemplar = np.array([True, True, False, False])
    assert metrics.is_tied(np.array([1.0, 3.0, 3.0, 0.0]), is_exemplar)
    assert not metrics.is_tied(np.array([1.0, 1.0, 3.0, 3.0]), is_exemplar)


def test_queries_are_grouped_by_kind_and_test_case():
    tasks = [
        make_task("test_art", "A picture in the Style of <new1> art"),
        make_task(),
        make_task("test_art", "in the style of <new1>"),
    ]
    assert [kind_of(task) for task in tasks] == ["style", "object", "style"]
    groups = {name: rows.tolist() for name, rows in group_queries(tasks).items()}
    assert groups == {
        "all": [0, 1, 2],
        "style": [0, 2],
        "object": [1],
        "test_art": [0, 2],
        "test_tiny": [1],
    }


def test_a_candidate_scores_by_the_better_of_its_views_less_the_mean_of_all_whatever_the_blocks():
    generator = np.random.default_rng(0)
    queries, candidates = 5 + generator.normal(size=(3, 8)), 5 + generator.normal(size=(2, 10, 8))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    mean = candidates.reshape(20, 8).mean(axis=0)
    expected = [
        [
            max(cosine(query - mean, candidates[view, n] - mean) for view in (0, 1))
            for n in range(10)
        ]
        for query in queries
    ]
    for cuts in [], [3], [1, 7]:
        blocks = np.split(candidates, cuts, axis=1)
        np.testing.assert_allclose(
            cosine_scores(queries, blocks, mean_features(blocks)), expected, atol=1e-5
        )


def test_an_image_without_length_scores_zero():
    assert cosine_scores(np.ones((1, 4)), [np.zeros((2, 1, 4))], 0).tolist() == [[0]]


def test_words_score_by_the_share_of_all_words_that_prompt_and_caption_have_in_common_whatever_case_and_stops():
    scores = list(
        word_scores(["A red <new1> cat", "", "b"], ["a cat, a CAT.", "red", "", "<new1> Cat"])
    )
    np.testing.assert_allclose(scores, [[2 / 4, 1 / 4, 0, 2 / 4], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_exemplars_whose_captions_say_no_more_than_others_are_ranked_after_them():
    task = replace(make_task(train_prompt="a blob"), exemplar_paths=(1, 2))
    found = [
        measure_words([task], captions)[0, -1]
        for captions in (["a cat", "two"], ["Blob, a", "cat"], ["dog"])
    ]
    assert found == pytest.approx([1, (1 / 2 + 2 / 3) / 2, 1])
    assert measure_words([replace(task, prompt="xyz")], ["dog"] * 98)[0].tolist() == [
        0,
        0,
        1,
        pytest.approx((1 / 99 + 2 / 100) / 2),
    ]


def test_features_that_are_the_mean_but_for_rounding_score_zero_and_others_as_before():
    generator = np.random.default_rng(0)
    alike = (generator.normal(size=8) * (1 + 1e-7 * generator.normal(size=(2, 50, 1)))).astype(
        np.float32
    )
    assert not cosine_scores(alike[0, :3], [alike], mean_features([alike])).any()
    near = alike * (1 + 1e-3 * generator.normal(size=alike.shape)).astype(np.float32)
    assert (
        cosine_scores(near[0, :3], [near], mean_features([near])).argmax(axis=1) == [0, 1, 2]
    ).all()


def test_scores_that_are_all_equal_are_measured_as_chance_and_it_says_so(monkeypatch):
    task = replace(make_task(), exemplar_paths=(1, 2))
    monkeypatch.setattr(
        "unlearn.commands.evaluate_baselines.score_queries",
        lambda *_: iter([np.zeros(9), np.array([1.0, 2, 1, *[0] * 6])]),
    )
    values, notices = measure("pixel", None, None, [task, task], "", 7)
    np.testing.assert_allclose(values, [metrics.chance_metrics(2, 9), [1, 1, 1, 1]])
    assert notices == [
        "pixel: in 1 queries exemplars tie with training images, counted in the exemplars' favour.",
        "pixel: in 1 of 2 queries all images have the same score, which is measured as chance.",
    ]


def test_pixels_are_those_of_the_transform_and_its_mirror_and_large_ones_are_averaged(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (140, 128, 3), np.uint8)).save(
        tmp_path / "image.png"
    )
    path, image = tmp_path / "image.png", load_image(tmp_path / "image.png")
    for view, mirrored in enumerate((False, True)):
        np.testing.assert_array_equal(
            pixel_encoder(32)([path])[view, 0], transform_image(image, 32, mirrored).flatten()
        )
        averaged = (
            transform_image(image, 128, mirrored)
            .reshape(3, 64, 2, 64, 2)
            .mean(dim=(2, 4))
            .flatten()
        )
        np.testing.assert_allclose(pixel_encoder(128)([path])[view, 0], averaged, atol=1e-6)


@pytest.mark.parametrize("method", ["pixel", "vae"])
def test_a_mirrored_training_image_finds_itself_among_exemplars_and_training_images(
    tmp_path, method
):
    paths = sorted((FIXTURE / "abc/laion_subset/images").iterdir())
    numbers, tasks = {7: (20, 21), 9: (33, 20)}, []
    for number, exemplars in numbers.items():
        load_image(paths[number]).transpose(Image.FLIP_LEFT_RIGHT).save(tmp_path / f"{number}.png")
        tasks.append(
            Task(
                f"{number}.png",
                "",
                "",
                0,
                "",
                "",
                None,
                tuple(paths[exemplar] for exemplar in exemplars),
            )
        )
    if method == "vae":
        model = load_model(str(FIXTURE / "sd-tiny"), "cpu")
        encode = latent_encoder(model, 512, 4)
        training_set = open_training_set(
            FIXTURE / "abc", "abc", model.latent_shape(512), model.conditioning_shapes
        )
        blocks = lambda: latent_blocks(training_set)
    else:
        encode = pixel_encoder(512)
        blocks = lambda: encode_blocks(encode, paths)
    for (number, exemplars), scores in zip(
        numbers.items(), score_queries(encode, blocks, tasks, tmp_path), strict=True
    ):
        assert (
            scores.shape == (62,)
            and rank_images(scores)[0] == 2 + number
            and scores[2 + number] == pytest.approx(1, abs=1e-4)
        )
        # Scored as exemplars and as training images alike.
        np.testing.assert_allclose(
            scores[:2], scores[[2 + exemplar for exemplar in exemplars]], atol=1e-4
        )


def test_the_command_measures_ours_chance_and_baselines_and_writes_three_tables(
    arguments, tmp_path, capsys
):
    main(arguments)
    screen = capsys.readouterr().out
    assert "2 queries of 1 models; 65 candidates each, 5 of them exemplars" in screen
    assert screen.count("all = object = test_tiny (2 queries)") == 1
    assert "| ours   | 0.700 ± 0.300 | 0.800 ± 0.200 |" in screen
    assert "highest possible" not in screen  # 5 exemplars fit into the top 5
    assert not list(tmp_path.glob("**/*.part"))
    rows = {
        (row["method"], row["group"], row["metric"]): row
        for row in read_csv(tmp_path / "evaluate/evaluate.csv")
    }
    assert {key[0] for key in rows} == {"ours", "random", "words", "pixel", "vae"}
    assert {key[1] for key in rows} == {"all", "object", "test_tiny"}
    precision = np.mean([1, (1 + 2 / 4 + 3 / 7 + 4 / 20 + 5 / 65) / 5])
    assert float(rows["ours", "all", "mAP"]["mean"]) == pytest.approx(precision)
    assert float(rows["random", "all", "Recall@10"]["mean"]) == pytest.approx(10 / 65)
    assert float(rows["random", "object", "mAP"]["mean"]) == pytest.approx(
        metrics.expected_average_precision(5, 65)
    )
    queries = read_csv(tmp_path / "evaluate/queries.csv")
    assert (
        len(queries) == 10
        and queries[0]["synth_image_path"] == "synth/tiny/gpt/blob/samples/00000.png"
    )
    paired = {
        (row["baseline"], row["group"], row["metric"]): row
        for row in read_csv(tmp_path / "evaluate/paired.csv")
    }
    ours, vae = (
        np.array([float(row["AP"]) for row in queries if row["method"] == method])
        for method in ("ours", "vae")
    )
    difference = ours - vae
    assert float(paired["vae", "all", "mAP"]["mean_difference"]) == pytest.approx(difference.mean())
    assert float(paired["vae", "all", "mAP"]["standard_error"]) == pytest.approx(
        difference.std(ddof=1) / np.sqrt(2)
    )


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_that_queries_were_hardly_unlearned_or_too_much_is_repeated_in_one_line(
    arguments, tmp_path, capsys
):
    save_influence(
        tmp_path,
        RESULTS[1],
        influence_with_ranks([1, 4, 7, 20, 65]),
        relative_weight_change=1e-4,
        query_loss_before=0.1758,
        query_loss_after=0.1758,
    )
    main(arguments)
    said = [line for line in capsys.readouterr().out.splitlines() if "Warning" in line]
    assert said == [
        f"Warning: 1 of 2 queries may mean little, first synth/{RESULTS[1]}: the weights "
        f"moved by 0.01 %, less "
        "than 0.5 %: scores may be noise; the query's own loss did not rise (0.1758 to 0.1758): "
        "it was not unlearned."
    ]


def test_a_highest_recall_below_1_is_stated_in_the_table():
    values = {"ours": np.array([metrics.query_metrics(np.arange(1, 9))])}
    rows = metrics.summarise(values, np.array([metrics.highest_metrics(8)]), {"all": np.array([0])})
    lines = metrics.summary_table(rows, "all")
    assert [cell.strip() for cell in lines[-1].split("|")[1:-1]] == [
        "highest possible",
        "0.625",
        "",
        "",
        "",
    ]
    assert len({len(line) for line in lines}) == 1


def test_a_missing_influence_file_names_the_command_and_nothing_is_written(arguments, tmp_path):
    path = tmp_path / "influence" / RESULTS[1] / "influence.npz"
    path.unlink()
    with pytest.raises(
        UserError,
        match=r"00001.png/influence.npz: no such file; make it: python compute_influence.py "
        r"--task_json ",
    ):
        main(arguments)
    assert not (tmp_path / "evaluate").exists()


def test_an_influence_file_changed_after_its_record_is_refused(arguments, tmp_path):
    path = tmp_path / "influence" / RESULTS[0] / "influence.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="its content is not what its record says"):
        main(arguments)


def test_a_rank_that_is_not_the_order_of_influence_is_refused(arguments, tmp_path):
    save_influence(
        tmp_path, RESULTS[0], influence_with_ranks([1, 2, 3, 4, 5]), rank=np.arange(65)[::-1]
    )
    with pytest.raises(UserError, match="rank is not the order of falling influence"):
        main(arguments)


def test_queries_ranked_over_different_numbers_of_images_are_refused(arguments, tmp_path):
    save_influence(tmp_path, RESULTS[1], influence_with_ranks([1, 2, 3, 4, 5], 40), 40)
    with pytest.raises(
        UserError,
        match=r"00001.png/influence.npz: ranks 40 training images, .*00000.png/influence.npz has 60",
    ):
        main(arguments)


def test_another_subset_than_was_ranked_is_refused(arguments):
    with pytest.raises(
        UserError,
        match="ranks 60 training images, the data root .* has 50; give the --laion_subset_size",
    ):
        main([*arguments, "--laion_subset_size", "50"])


def test_an_influence_file_of_other_exemplars_is_refused(arguments, tmp_path):
    path = tmp_path / "influence" / RESULTS[0] / "influence.npz"
    arrays = dict(np.load(path))
    arrays["ids"][0] = "exemplar/other.png"
    np.savez(path, **arrays)
    write_record(path, {})
    with pytest.raises(
        UserError,
        match="expected the 5 exemplars exemplar/tiny/0.png.* found 5: exemplar/other.png",
    ):
        main(arguments)


def test_without_pictures_the_pixel_baseline_is_left_out_with_a_note_and_features_are_refused(
    arguments, tmp_path, capsys
):
    root = tmp_path / "root"
    (root / "laion_subset").mkdir(parents=True)
    arrays = "laion_latents.npy", "laion_text_embeddings.npy", "laion_subset/captions.txt"
    for name in ("json", "synth", "exemplar", "models", *arrays):
        copy_tree(FIXTURE / "abc" / name, root / name)
    arguments[arguments.index("--dataroot") + 1] = str(root)
    main(arguments)
    assert "The pixel baseline is left out" in capsys.readouterr().out
    assert {row["method"] for row in read_csv(tmp_path / "evaluate/queries.csv")} == {
        "ours",
        "random",
        "words",
        "vae",
    }
    with pytest.raises(UserError, match="--features some/clip: needs the pictures"):
        main([*arguments, "--features", "some/clip"])


def copy_tree(source, target):
    if source.is_dir():
        for child in source.iterdir():
            copy_tree(child, target / child.name)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A miniature CLIP with random weights."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPConfig(
        text_config={**size, "vocab_size": 50},
        projection_dim=8,
        vision_config={**size, "image_size": 32, "patch_size": 16},
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def test_features_of_a_clip_model_are_a_further_method(arguments, tmp_path, clip_folder):
    main([*arguments, "--features", str(clip_folder), "--output", str(tmp_path / "out")])
    methods = [row["method"] for row in read_csv(tmp_path / "out/queries.csv")]
    assert methods == ["ours", "random", "words", "pixel", "vae", "tiny-clip"] * 2


def test_features_do_not_depend_on_the_batch_and_the_second_view_is_the_mirrored_image(
    tmp_path, clip_folder
):
    paths = sorted((FIXTURE / "abc/laion_subset/images").iterdir())[:3]
    alone, together = (feature_encoder(str(clip_folder), "cpu", size)(paths) for size in (1, 3))
    assert together.shape == (2, 3, 8) and together.dtype == np.float32
    np.testing.assert_allclose(alone, together, atol=1e-5)
    load_image(paths[0]).transpose(Image.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    mirrored = feature_encoder(str(clip_folder), "cpu", 1)([tmp_path / "mirrored.png"])
    np.testing.assert_allclose(mirrored[:, 0], together[::-1, 0], atol=1e-5)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99),
            "cannot be used as a model of image features",
        ),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "cannot be used as a model of image features",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"model_type": "unheard-of"})
            ),
            "cannot be used",
        ),
        (
            lambda folder: drop_weight(folder / "model.safetensors", "visual_projection.weight"),
            "has no weight visual_projection",
        ),
    ],
)
def test_a_feature_model_that_cannot_be_used_ends_in_one_line(
    tmp_path, clip_folder, damage, reason
):
    copy_tree(clip_folder, tmp_path / "clip")
    damage(tmp_path / "clip")
    with pytest.raises(UserError, match=f"--features .*clip: .*{reason}") as error:
        feature_encoder(str(tmp_path / "clip"), "cpu", 1)
    assert "\n" not in str(error.value)


def drop_weight(path, name):
    from safetensors.torch import load_file, save_file

    save_file(
        {key: value for key, value in load_file(path).items() if key != name},
        path,
        {"format": "pt"},
    )


def test_queries_unlearned_with_other_settings_or_ranked_against_replaced_losses_are_not_averaged(
    flags, tmp_path
):
    """Through the scripts themselves: what their records say is what evaluate checks."""
    small = [*flags, "--laion_subset_size", "3"]
    steps = [
        "--loss_time_samples",
        "2",
        "--unlearn_steps",
        "1",
        "--unlearn_batch_size",
        "2",
        "--unlearn_grad_accum_steps",
        "1",
    ]
    compute_training_loss.main([*small, "--time_samples", "2"])
    compute_influence.main([*small, *steps, "--unlearn_lr", "10"])
    main([*small, "--output", str(tmp_path / "out")])
    one = json.loads(Path(flags[1]).read_text())[:1]
    (tmp_path / "one.json").write_text(json.dumps(one))
    compute_influence.main(
        [
            "--task_json",
            str(tmp_path / "one.json"),
            *small[2:],
            *steps,
            "--unlearn_lr",
            "20",
            "--overwrite",
        ]
    )
    with pytest.raises(
        UserError, match="unlearned with unlearn_lr .*only queries unlearned alike can be averaged"
    ):
        main([*small, "--output", str(tmp_path / "out")])
    compute_influence.main([*small, *steps, "--unlearn_lr", "10", "--overwrite"])
    compute_training_loss.main([*small, "--time_samples", "2", "--noise_seed", "5", "--overwrite"])
    with pytest.raises(UserError, match="was ranked against other losses than"):
        main([*small, "--output", str(tmp_path / "out")])
