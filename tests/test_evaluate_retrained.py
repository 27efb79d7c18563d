"""Evaluation against retrained models: a world whose losses are known functions of membership, and
every bad input."""

import base64
import csv
import json

import numpy as np
import pytest
from PIL import Image

from unlearn import UserError
from unlearn.attribution.influence import rank_images
from unlearn.commands.evaluate import main
from unlearn.datasets.tasks import load_tasks
from unlearn.evaluation.retrained import query_digests
from unlearn.evaluation.scores import keep_order, random_scores
from unlearn.storage.artifacts import write_json
from unlearn.storage.records import write_record

NUM_IMAGES, NUM_QUERIES, TRAINING_SET = 41, 5, "set"
QUERIES = [f"queries/{number:05d}" for number in range(NUM_QUERIES)]


class World:
    """A data root, influence files and retrained models in which query q's loss falls by effect[q,
    i] where image i is kept."""

    def __init__(self, folder, num_images=NUM_IMAGES, queries=QUERIES, noise=0.0):
        self.folder, self.queries, self.noise, self.shift = (
            folder,
            queries,
            noise,
            0.0,
        )  # shift: of the losses, by another seed
        self.generator = np.random.default_rng(0)
        self.effect = self.generator.exponential(1e-3, (len(queries), num_images))
        entries = [
            {"synth_image_path": f"synth/{query}.png", "prompt": "a thing", "seed": 0}
            for query in queries
        ]
        write_json(folder / "tasks.json", entries)
        for entry in entries:
            path = folder / "root" / entry["synth_image_path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"a picture")
        (self.retrained / "x").parent.mkdir(parents=True)
        self.digests = query_digests(
            load_tasks(folder / "tasks.json", folder / "root"), folder / "root"
        )

    @property
    def retrained(self):
        return self.folder / "retrained"

    def flags(self, *more):
        return [
            "--task_json",
            str(self.folder / "tasks.json"),
            "--dataroot",
            str(self.folder / "root"),
            "--device",
            "cpu",
            "--result_dir",
            str(self.folder / "results"),
            "--retrained",
            str(self.retrained),
            "--output",
            str(self.folder / "out"),
            *more,
        ]

    def save_influence(self, method, scores, training_set=TRAINING_SET, shown=None, **settings):
        below = "influence" if method == "ours" else f"baselines/{method}"
        for query, influence in zip(self.queries, np.asarray(scores, np.float64)):
            path = self.folder / "results" / below / query / "influence.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            ids = np.array([f"laion/{row:06d}" for row in range(len(influence))])
            np.savez(
                path,
                ids=ids,
                influence=influence,
                rank=rank_images(influence),
                is_exemplar=np.zeros(len(ids), bool),
                **(shown or {}),
            )
            write_record(
                path, {"settings": settings, "candidates": [training_set], "weight_change": query}
            )

    def save_model(self, name, kind, kept, seed=0, removed=None, **identity):
        loss = (
            0.2
            - self.effect @ kept
            + self.effect.sum(axis=1)
            + self.noise * self.generator.normal(size=len(self.queries))
        )
        loss += self.shift * seed
        members = base64.b64encode(np.packbits(kept).tobytes()).decode()
        identity = {
            "format_version": 1,
            "recipe": "recipe",
            "training_set": TRAINING_SET,
            "num_images": len(kept),
            "seed": seed,
            "members": members,
            "queries": self.digests,
            "timesteps": 200,
            "noise_seed": 0,
            "num_inference_steps": 50,
            **identity,
        }
        mse = {query: float(2 * (value - 0.2)) for query, value in zip(self.queries, loss)}
        write_json(
            self.retrained / f"{name}.json",
            {
                "identity": identity,
                "kind": kind,
                "losses": dict(zip(self.queries, loss.tolist())),
                "mse": mse,
                "similarity": {query: 1 - value for query, value in mse.items()},
                "circumstances": {},
                **({"removed": removed} if removed else {}),
            },
        )

    def save_full(self, *seeds):
        for seed in seeds:
            self.save_model(f"full-seed{seed}", "full", np.ones(self.effect.shape[1], bool), seed)

    def save_halves(self, count):
        size = self.effect.shape[1]
        for number in range(count):
            self.save_model(
                f"half-{number:03d}",
                "subset",
                np.random.default_rng([1, number]).permutation(size) < size // 2,
            )

    def save_without(self, method, scores, k, rows):
        for row in rows:
            kept = np.ones(self.effect.shape[1], bool)
            kept[rank_images(np.asarray(scores[row]))[:k]] = False
            removed = {"method": method, "query": self.queries[row], "k": k}
            self.save_model(f"without-{method}-{row:05d}-k{k}", "without", kept, removed=removed)

    def save_random(self, k, count):
        for number in range(count):
            kept = np.ones(self.effect.shape[1], bool)
            kept[np.random.default_rng([2, k, number]).permutation(len(kept))[:k]] = False
            self.save_model(
                f"random-k{k}-{number:03d}",
                "without",
                kept,
                removed={"method": "random", "query": None, "k": k},
            )

    def edit(self, name, change):
        path = self.retrained / name
        record = json.loads(path.read_text())
        change(record)
        write_json(path, record)

    def table(self, name, output="out"):
        with open(self.folder / output / f"{name}.csv", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def without_plots(monkeypatch):
    """Plots take most of the time; the one test of them asks for them."""
    monkeypatch.setattr("unlearn.evaluation.plots.find_spec", lambda name: None)


@pytest.fixture
def world(tmp_path):
    """Scores that are the effects themselves, and noise; two full models, 12 halves, K = 4 for two
    methods and at random."""
    made = World(tmp_path)
    noise = np.random.default_rng(3).normal(size=made.effect.shape)
    made.save_influence("ours", made.effect)
    made.save_influence("pixel", noise)
    made.save_full(0, 1)
    made.save_halves(12)
    made.save_without("ours", made.effect, 4, range(NUM_QUERIES))
    made.save_without("pixel", noise, 4, [0, 2])
    made.save_random(4, 3)
    made.save_random(10, 2)
    return made


def read_tables(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


def find(rows, **values):
    return next(row for row in rows if all(row[key] == value for key, value in values.items()))


def test_scores_that_are_the_effects_reach_lds_1_and_random_ones_are_always_there(world, capsys):
    main(world.flags())
    rows, screen = world.table("lds"), capsys.readouterr().out
    assert [row["method"] for row in rows] == ["ours", "pixel", "random"]
    ours, pixel, _ = rows
    assert (
        float(ours["lds"]) == pytest.approx(1)
        and float(ours["low"]) == pytest.approx(1)
        and ours["ours_minus"] == ""
    )
    assert abs(float(pixel["lds"])) < 0.6 and float(pixel["low"]) < float(pixel["lds"]) < float(
        pixel["high"]
    )
    assert (
        float(pixel["ours_minus"]) == pytest.approx(1 - float(pixel["lds"]))
        and float(pixel["ours_minus_low"]) > 0
    )
    assert (ours["queries"], ours["models"]) == ("5", "12")
    assert "2 full models, 12 on random subsets, 12 without chosen or random images" in screen
    assert (
        "over the subsets (seed 0) and by" in screen
        and "over the seeds of 2 full models." in screen
    )
    queries = world.table("lds_queries")
    assert len(queries) == 15 and {row["query"] for row in queries} == set(QUERIES)
    pixel_queries = [float(row["lds"]) for row in queries if row["method"] == "pixel"]
    assert np.mean(pixel_queries) == pytest.approx(float(pixel["lds"]))


def test_that_a_step_was_too_large_is_repeated_from_influence_files_and_from_scores(world, capsys):
    world.save_influence(
        "ours",
        world.effect,
        shown={"relative_weight_change": 7.81, "query_loss_before": 0.1, "query_loss_after": 1.9},
    )
    said = (
        "Warning: 5 of 5 queries scored by ours may mean little, first q0: the weights moved by "
        "781 %, more than 15 %: "
        "the model is another one, and scores mean little."
    )
    main(world.flags())
    assert capsys.readouterr().out.count("Warning") == 1
    main(world.flags("--scores", str(world.folder / "out/scores")))
    assert said.replace("q0", QUERIES[0]) in capsys.readouterr().out


def test_leave_k_out_means_are_those_of_the_queries_by_hand(world, capsys):
    main(world.flags())
    screen, rows = capsys.readouterr().out, world.table("leave_k_out")
    assert [(row["method"], row["k"], row["queries"], row["models"]) for row in rows] == [
        ("full, seed 0", "0", "5", "1"),
        ("full, other seeds", "0", "5", "1"),
        ("ours", "4", "5", "5"),
        ("pixel", "4", "2", "2"),
        ("random", "4", "5", "3"),
        ("random", "10", "5", "2"),
    ]
    changes = np.sort(world.effect, axis=1)[:, -4:].sum(axis=1)
    ours = find(rows, method="ours", k="4")
    assert float(ours["dL"]) == pytest.approx(changes.mean()) and float(
        ours["mse"]
    ) == pytest.approx(2 * changes.mean())
    assert float(ours["dL_error"]) == pytest.approx(changes.std(ddof=1) / np.sqrt(5))
    assert float(ours["similarity"]) == pytest.approx(1 - 2 * changes.mean())
    noise = np.random.default_rng(3).normal(size=world.effect.shape)
    pixel = np.array([world.effect[row, rank_images(noise[row])[:4]].sum() for row in (0, 2)])
    assert float(find(rows, method="pixel", k="4")["dL"]) == pytest.approx(pixel.mean())
    removed = [
        np.random.default_rng([2, 4, number]).permutation(NUM_IMAGES)[:4] for number in range(3)
    ]
    chance = np.mean([world.effect[:, rows].sum(axis=1) for rows in removed], axis=0)
    assert float(find(rows, method="random", k="4")["dL"]) == pytest.approx(chance.mean())
    paired = find(world.table("leave_k_out_paired"), baseline="pixel")
    assert paired["queries"] == "2" and float(paired["dL"]) == pytest.approx(
        (changes[[0, 2]] - pixel).mean()
    )
    assert float(find(world.table("leave_k_out_paired"), baseline="random")["dL"]) == pytest.approx(
        (changes - chance).mean()
    )
    assert (
        float(rows[0]["dL"]) == 0
        and float(rows[0]["mse"]) == pytest.approx(0)
        and float(rows[1]["dL"]) == pytest.approx(0)
    )
    assert "Not every method and K has the same queries yet" in screen


def test_retention_tells_the_query_from_all_others(world):
    main(world.flags())
    ours = find(world.table("retention"), method="ours", k="4")
    own, others = [], []
    for row in range(NUM_QUERIES):
        changes = world.effect[:, rank_images(world.effect[row])[:4]].sum(axis=1)
        own.append(changes[row])
        others.append(np.delete(changes, row).mean())
    assert float(ours["own_dL"]) == pytest.approx(np.mean(own)) and float(
        ours["others_dL"]
    ) == pytest.approx(np.mean(others))
    assert float(ours["others_dL_error"]) == pytest.approx(
        np.std(others, ddof=1) / np.sqrt(NUM_QUERIES)
    )
    assert float(ours["others_mse"]) == pytest.approx(2 * np.mean(others))
    assert find(world.table("retention"), method="random", k="4")["own_dL"] == ""
    assert float(
        find(world.table("retention"), method="full, other seeds")["others_dL"]
    ) == pytest.approx(0, abs=1e-12)


def test_the_equivalent_number_is_k_where_all_images_count_alike_and_beyond_the_most_tried_it_says_so(
    tmp_path, capsys
):
    world = World(tmp_path)
    world.effect[:] = 1e-3
    world.effect[0, :20] = 0.02
    world.save_full(0)
    world.save_halves(3)
    world.save_influence("ours", world.effect)
    world.save_without("ours", world.effect, 7, [1, 2, 3])
    world.save_without("ours", world.effect, 9, [0])
    world.save_random(5, 2)
    main(world.flags())
    seven, nine = world.table("equivalent")
    assert [float(seven[key]) for key in ("random_images", "low", "high")] == pytest.approx(
        [7, 7, 7]
    ) and seven["queries"] == "3"
    assert nine["most_tried"] == "21" and float(nine["random_images"]) < 21
    world.save_without("ours", world.effect, 19, [0])
    world.save_without("ours", world.effect, 22, [1])
    main(world.flags())
    assert find(world.table("equivalent"), k="22")["random_images"] == "inf"
    assert ">= 21" in capsys.readouterr().out


def test_tables_are_the_same_from_influence_files_and_from_scores_alone(world, tmp_path):
    world.save_influence(
        "vae", 1 + 1e-12 * np.random.default_rng(8).normal(size=world.effect.shape)
    )  # float32 alone would tie all
    main(world.flags())
    tables = read_tables(tmp_path / "out")
    (tmp_path / "results").rename(tmp_path / "gone")
    main(world.flags("--scores", str(tmp_path / "out/scores"), "--output", str(tmp_path / "again")))
    assert read_tables(tmp_path / "again") == tables and len(tables) == 8
    assert not (tmp_path / "again/scores").exists()


def test_scores_of_more_queries_than_are_evaluated_give_the_rows_of_those_that_are(world, tmp_path):
    main(world.flags())
    write_json(tmp_path / "tasks.json", json.loads((tmp_path / "tasks.json").read_text())[3:])
    main(
        world.flags(
            "--scores", str(tmp_path / "out/scores"), "--output", str(tmp_path / "from_scores")
        )
    )
    main(world.flags("--output", str(tmp_path / "from_files")))
    assert read_tables(tmp_path / "from_scores") == read_tables(tmp_path / "from_files")


def test_random_removal_is_measured_on_the_queries_that_the_methods_are(world):
    for row in 1, 3, 4:
        remove(f"without-ours-{row:05d}-k4.json")(world)
    main(world.flags())
    removed = [
        np.random.default_rng([2, 4, number]).permutation(NUM_IMAGES)[:4] for number in range(3)
    ]
    chance = np.mean([world.effect[:, rows].sum(axis=1) for rows in removed], axis=0)
    random = find(world.table("leave_k_out"), method="random", k="4")
    assert random["queries"] == "2" and float(random["dL"]) == pytest.approx(chance[[0, 2]].mean())


def test_files_by_other_names_and_queries_in_another_order_change_nothing(world, tmp_path):
    main(world.flags())
    tables = read_tables(tmp_path / "out")
    names = [f"half-{number:03d}.json" for number in range(12)]
    for old, new in zip(names, np.random.default_rng(0).permutation(12)):
        (world.retrained / old).rename(world.retrained / f"half-x{new:02d}.json")
    write_json(tmp_path / "tasks.json", json.loads((tmp_path / "tasks.json").read_text())[::-1])
    main(world.flags("--output", str(tmp_path / "again")))
    assert read_tables(tmp_path / "again") == tables


def test_scores_that_did_not_change_are_not_written_again(world, tmp_path):
    main(world.flags())
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "out/scores").iterdir()
    }
    main(world.flags())
    assert before == {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "out/scores").iterdir()
    }
    assert set(before) == {"ours.npz", "ours.json", "pixel.npz", "pixel.json"}


def test_every_ranking_survives_float32():
    generator = np.random.default_rng(0)
    for influence in (
        generator.normal(size=500),
        1 + 1e-13 * generator.normal(size=500),
        generator.normal(size=500) * 1e-42,
        np.round(generator.normal(size=500), 1),
        np.array([0.0, -0.0, 1e-300, -1e-300, 5, 5]),
    ):
        kept = keep_order(influence)
        assert kept.dtype == np.float32 and (rank_images(kept) == rank_images(influence)).all()
        assert np.allclose(kept, influence, rtol=1e-4, atol=1e-42)
        order = rank_images(influence)
        np.testing.assert_array_equal(np.diff(kept[order]) == 0, np.diff(influence[order]) == 0)


def test_random_scores_belong_to_the_query(world):
    np.testing.assert_array_equal(random_scores(QUERIES[::-1], 9)[::-1], random_scores(QUERIES, 9))
    assert len({tuple(row) for row in random_scores(QUERIES, 9)}) == NUM_QUERIES


def test_scores_are_told_beyond_their_top_image_and_beyond_similarity(world, capsys):
    similarity = np.where(world.effect == world.effect.max(axis=1, keepdims=True), 1.0, 0.0)
    world.save_influence("similarity", similarity)
    main(world.flags())
    rows = {row["method"]: row for row in world.table("lds_beyond")}
    # Scores that are the effects explain the rest too; who knows the top image alone knows no more.
    assert float(rows["ours"]["beyond_top_image"]) == pytest.approx(1)
    assert float(rows["ours"]["beyond_similarity"]) == pytest.approx(1)
    assert float(rows["similarity"]["beyond_top_image"]) == 0
    assert float(rows["similarity"]["beyond_similarity"]) == 0
    for row in rows.values():
        for name in "beyond_top_image", "beyond_similarity":
            low, value, high = (float(row[name + end]) for end in ("_low", "", "_high"))
            assert low <= value <= high
    assert "beyond similarity" in capsys.readouterr().out


def test_without_similarity_nothing_is_told_beyond_it(world):
    main(world.flags())
    assert {row["beyond_similarity"] for row in world.table("lds_beyond")} == {""}


def test_the_ceiling_stands_beside_the_lds_where_models_are_enough(world, capsys):
    main(world.flags())
    assert "The ceiling: no sum of one number an image has an LDS above about" in (
        capsys.readouterr().out
    )
    for number in range(5, 12):
        (world.retrained / f"half-{number:03d}.json").unlink()
    main(world.flags())
    assert "The ceiling" not in capsys.readouterr().out


def test_halves_alone_give_the_lds_and_removals_alone_give_leave_k_out(world, tmp_path, capsys):
    for path in [
        *world.retrained.glob("without-*"),
        *world.retrained.glob("random-*"),
        *world.retrained.glob("full-*"),
    ]:
        path.rename(tmp_path / path.name)
    main(world.flags())
    screen = capsys.readouterr().out
    assert (
        "No full model yet: leave-K-out, retention and equivalent numbers need the one that made "
        "the queries." in screen
    )
    assert "over the subsets (seed 0)." in screen and "full models." not in screen
    assert (
        float(world.table("lds")[0]["lds"]) == pytest.approx(1) and world.table("leave_k_out") == []
    )
    (tmp_path / "full-seed0.json").rename(world.retrained / "full-seed0.json")
    main(world.flags())
    assert "No models without the top K of a method yet" in capsys.readouterr().out
    for path in world.retrained.glob("half-*"):
        path.rename(tmp_path / path.name)
    (tmp_path / "without-ours-00002-k4.json").rename(world.retrained / "without-ours-00002-k4.json")
    main(world.flags())
    assert "No models on random subsets yet: no LDS." in capsys.readouterr().out
    assert world.table("lds") == [] and world.table("equivalent") == []
    assert find(world.table("leave_k_out"), method="ours")["queries"] == "1"


@pytest.fixture
def tuned(tmp_path):
    """Scores that are the effects' square roots, and cubes of noise; five reported queries and
    three for tuning, 40 halves."""
    made = World(tmp_path, queries=[*QUERIES, *(f"tuning/{number}" for number in range(3))])
    made.save_influence("ours", np.sqrt(made.effect))
    made.save_influence(
        "text", np.sqrt(made.effect) + np.random.default_rng(4).normal(0, 0.02, made.effect.shape)
    )
    made.save_full(0)
    made.save_halves(40)
    entries = json.loads((tmp_path / "tasks.json").read_text())
    write_json(tmp_path / "tasks.json", entries[:5])
    write_json(tmp_path / "tuning.json", entries[5:])
    return made


def test_each_methods_power_is_chosen_on_the_tuning_queries_and_told_beside_the_plain_sum(
    tuned, tmp_path, capsys
):
    tuning = ["--tuning_json", str(tmp_path / "tuning.json")]
    main(tuned.flags(*tuning))
    ours, text, random = tuned.table("lds")
    assert (
        ours["power"] == "2"
        and float(ours["powered_lds"]) == pytest.approx(1)
        and float(ours["lds"]) < 0.99
    )
    assert float(ours["tuning_lds"]) == pytest.approx(1) and (
        ours["tuning_queries"],
        ours["queries"],
    ) == ("3", "5")
    assert float(text["powered_ours_minus"]) == pytest.approx(1 - float(text["powered_lds"]))
    assert (
        float(text["powered_ours_minus_low"])
        < float(text["powered_ours_minus"])
        < float(text["powered_ours_minus_high"])
    )
    assert random["method"] == "random" and random["power"] in ("1", "1.5", "2", "3", "4")
    rows = [row for row in tuned.table("lds_queries") if row["method"] == "ours"]
    assert [row["query"] for row in rows] == QUERIES and {row["powered_lds"] for row in rows} == {
        "1.0"
    }
    assert "LDS after the power" in capsys.readouterr().out
    before = read_tables(tmp_path / "out")
    main(
        tuned.flags(
            *tuning, "--scores", str(tmp_path / "out/scores"), "--output", str(tmp_path / "again")
        )
    )
    assert read_tables(tmp_path / "again") == before


def test_without_tuning_queries_no_power_is_chosen_and_evaluate_says_how(tuned, capsys):
    main(tuned.flags())
    assert {
        (row["power"], row["powered_lds"], row["tuning_queries"]) for row in tuned.table("lds")
    } == {("", "", "0")}
    screen = capsys.readouterr().out
    assert (
        "--tuning_json, a task file of further queries, lets evaluate choose" in screen
        and "after the power" not in screen
    )


@pytest.mark.parametrize(
    "damage, text",
    [
        (
            lambda world: write_json(
                world.folder / "tuning.json",
                json.loads((world.folder / "tasks.json").read_text())[:1],
            ),
            "tuning.json: queries/00000 is also in .*tasks.json; a power must be chosen on "
            "queries that are not reported",
        ),
        (
            lambda world: (world.folder / "results/baselines/text/tuning/1/influence.npz").unlink(),
            "tuning/1/influence.npz: no such file; make it: python -m unlearn baselines "
            "--task_json .*tuning.json .*--methods text",
        ),
        (
            lambda world: world.edit(
                "half-003.json", lambda record: record["losses"].pop("tuning/1")
            ),
            "half-003.json: has no loss of query tuning/1",
        ),
    ],
)
def test_tuning_queries_that_cannot_choose_a_power_end_in_one_line(tuned, damage, text):
    damage(tuned)
    with pytest.raises(UserError, match=text) as error:
        main(tuned.flags("--tuning_json", str(tuned.folder / "tuning.json")))
    assert "\n" not in str(error.value) and not (tuned.folder / "out").exists()


def test_subsets_of_a_rarer_size_count_as_random_removal_and_not_for_the_lds(world, capsys):
    for number in range(4):
        world.save_model(
            f"subset0.9-{number:03d}",
            "subset",
            np.random.default_rng([5, number]).permutation(NUM_IMAGES) < 37,
        )
    main(world.flags())
    assert {row["models"] for row in world.table("lds")} == {"12"} and float(
        world.table("lds")[0]["lds"]
    ) == pytest.approx(1)
    assert "2 full models, 16 on random subsets" in capsys.readouterr().out


def test_only_the_methods_asked_for_are_evaluated(world, tmp_path):
    main(world.flags("--methods", "pixel"))
    assert [row["method"] for row in world.table("lds")] == ["pixel"]
    assert {row["method"] for row in world.table("leave_k_out")} == {
        "full, seed 0",
        "full, other seeds",
        "pixel",
        "random",
    }
    assert world.table("leave_k_out_paired") == []


def test_a_task_file_of_fewer_queries_leaves_the_models_of_the_others_out_and_says_so(
    world, tmp_path, capsys
):
    write_json(tmp_path / "tasks.json", json.loads((tmp_path / "tasks.json").read_text())[:2])
    main(world.flags())
    assert (
        "4 models were trained without images of queries that are not in this task file; left out."
        in capsys.readouterr().out
    )
    ours = find(world.table("leave_k_out"), method="ours")
    assert (ours["queries"], ours["models"]) == ("2", "2")
    main(world.flags())
    assert (
        "2 full models, 12 on random subsets, 8 without chosen or random images"
        in capsys.readouterr().out
    )


def test_pictures_that_were_not_made_leave_their_cells_empty(world, capsys):
    for path in world.retrained.glob("*-*.json"):
        if path.stem != "full-seed0":
            world.edit(path.name, lambda record: record.update(mse={}, similarity={}))
    main(world.flags())
    assert {(row["mse"], row["similarity_error"]) for row in world.table("leave_k_out")[1:]} == {
        ("", "")
    }
    assert "nan" not in capsys.readouterr().out


def test_each_seeds_models_are_compared_with_the_full_model_of_their_seed_alone(world, capsys):
    """Models of seed 3 explain every query worse by 0.05, whatever was removed: nothing of it
    enters a difference."""
    main(world.flags())
    before = world.table("leave_k_out")
    world.shift = 0.05 / 3
    world.save_model("full-seed3", "full", np.ones(NUM_IMAGES, bool), seed=3)
    for row in range(2):
        world.save_model(
            f"without-ours-again{row}",
            "without",
            json_members(world, f"without-ours-0000{row}-k4.json"),
            seed=3,
            removed={"method": "ours", "query": QUERIES[row], "k": 4},
        )
        world.save_model(
            f"random-k4-00{row}-seed3",
            "without",
            json_members(world, f"random-k4-00{row}.json"),
            seed=3,
            removed={"method": "random", "query": None, "k": 4},
        )
    main(world.flags())
    rows, paired = world.table("leave_k_out"), world.table("leave_k_out_paired")
    assert rows[2:6] == before[2:6] and find(rows, method="ours", k="4")["models"] == "5"
    other = find(rows, method="ours, seed 3")
    changes = np.sort(world.effect, axis=1)[:2, -4:].sum(axis=1)
    assert float(other["dL"]) == pytest.approx(changes.mean()) and (
        other["mse"],
        other["queries"],
        other["models"],
    ) == ("", "2", "2")
    chance = np.mean(
        [
            world.effect[:2, ~json_members(world, f"random-k4-00{number}.json")].sum(axis=1)
            for number in range(2)
        ],
        axis=0,
    )
    assert float(find(paired, baseline="random, seed 3")["dL"]) == pytest.approx(
        (changes - chance).mean()
    )
    assert float(find(rows, method="full, other seeds")["dL"]) == pytest.approx(0.025)
    assert {row["method"] for row in world.table("retention")} >= {"ours, seed 3", "random, seed 3"}
    assert "nan" not in capsys.readouterr().out


def test_an_interval_without_the_random_models_deviation_says_so(world, capsys):
    main(world.flags())
    assert "leave out how such models deviate" not in capsys.readouterr().out
    for path in {*world.retrained.glob("half-*"), *world.retrained.glob("random-*-00[12].json")}:
        path.unlink()
    main(world.flags())
    assert (
        "No number of random images was removed by two models: the intervals of equivalent "
        "numbers leave out how" in capsys.readouterr().out
    )


def test_scores_that_leave_images_equal_are_told(world, capsys):
    main(world.flags())
    assert "the same score" not in capsys.readouterr().out
    scores = np.random.default_rng(3).normal(size=world.effect.shape)
    fourth, fifth = rank_images(scores[2])[3:5]
    scores[1], scores[2, fifth] = 0, scores[2, fourth]
    world.save_influence("pixel", scores)
    world.save_without("pixel", scores, 4, [0, 2])
    main(world.flags())
    screen = capsys.readouterr().out
    assert (
        "pixel: all images have the same score for 1 of 5 queries: of these it says nothing, and "
        "their LDS is 0." in screen
    )
    assert (
        "pixel: for 1 of 2 removals the K-th image and the next have the same score: the order "
        "of the files decided" in screen
    )


def test_the_lds_is_of_the_seed_of_the_queries_model_where_it_has_enough_subsets_else_it_says_so(
    world, capsys
):
    world.save_full(1)
    world.edit("full-seed1.json", lambda record: record.update(mse=dict.fromkeys(QUERIES, 0.01)))
    for number in range(9):
        edit(f"half-{number:03d}.json", "seed", 1)(world)
    main(world.flags())
    assert {row["models"] for row in world.table("lds")} == {
        "3"
    } and "not the seed of" not in capsys.readouterr().out
    remove("half-011.json")(world)
    main(world.flags())
    assert {row["models"] for row in world.table("lds")} == {"9"}
    assert (
        "The LDS is of models with seed 1, which is not the seed of the queries' model (0)"
        in capsys.readouterr().out
    )


def test_the_number_of_tuning_queries_is_told_and_few_are_warned_of(tuned, tmp_path, capsys):
    main(tuned.flags("--tuning_json", str(tmp_path / "tuning.json")))
    screen = capsys.readouterr().out
    assert (
        "powers chosen on 3 further queries)" in screen
        and "Powers were chosen on 3 tuning queries: another few may choose others" in screen
    )


def test_the_lds_is_of_the_subsets_of_one_seed(world, capsys):
    main(world.flags())
    before = world.table("lds")
    world.shift = 0.05
    for number in range(11):
        world.save_model(
            f"half-{number:03d}-seed1",
            "subset",
            np.random.default_rng([7, number]).permutation(NUM_IMAGES) < 20,
            seed=1,
        )
    main(world.flags())
    assert world.table("lds") == before
    assert (
        "The LDS is of the 12 models on 20 random images with seed 0; the 11 on subsets of "
        "another size" in capsys.readouterr().out
    )


def test_the_reference_is_the_model_that_makes_the_queries_again_not_the_lowest_seed(world):
    main(world.flags())
    tables = read_tables(world.folder / "out")
    for path in world.retrained.iterdir():  # the queries' model and its family get seed 5
        if path.stem != "full-seed1":
            edit(path.name, "seed", 5)(world)
    world.edit("full-seed1.json", lambda record: record.update(mse=dict.fromkeys(QUERIES, 0.01)))
    main(world.flags())
    assert float(find(world.table("leave_k_out"), method="full, seed 5")["mse"]) == pytest.approx(0)
    assert (
        world.table("equivalent")
        and (world.folder / "out/equivalent.csv").read_bytes() == tables["equivalent.csv"]
    )


def test_queries_that_cannot_be_made_again_are_compared_with_the_model_that_explains_them_best_and_it_says_so(
    world, tmp_path, capsys
):
    entries = json.loads((tmp_path / "tasks.json").read_text())
    for entry in entries:
        del entry["seed"]
    write_json(tmp_path / "tasks.json", entries)
    world.digests = query_digests(
        load_tasks(tmp_path / "tasks.json", tmp_path / "root"), tmp_path / "root"
    )
    for path in world.retrained.iterdir():
        world.edit(
            path.name,
            lambda record: (
                record["identity"].update(queries=world.digests),
                record.update(mse=None, similarity=None),
            ),
        )
    world.edit(
        "full-seed0.json",
        lambda record: record.update(
            losses={query: value + 0.01 for query, value in record["losses"].items()}
        ),
    )
    for path in [*world.retrained.glob("without-*"), *world.retrained.glob("random-*")]:
        edit(path.name, "seed", 1)(world)
    main(world.flags())
    assert (
        "queries without a seed, which no model can make again: full-seed1, the full model that "
        "explains" in capsys.readouterr().out
    )
    changes = np.sort(world.effect, axis=1)[:, -4:].sum(axis=1)
    assert float(find(world.table("leave_k_out"), method="ours", k="4")["dL"]) == pytest.approx(
        changes.mean()
    )


def json_members(world, name):
    packed = base64.b64decode(
        json.loads((world.retrained / name).read_text())["identity"]["members"]
    )
    return np.unpackbits(np.frombuffer(packed, np.uint8))[:NUM_IMAGES].astype(bool)


def test_plots_are_drawn_of_what_is_there_and_left_out_with_a_line_without_matplotlib(
    world, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    main(world.flags())
    assert "Drawn: lds.png, leave_k_out.png, equivalent.png" in capsys.readouterr().out
    assert all(
        (tmp_path / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
        for name in ("lds", "leave_k_out", "equivalent")
    )
    monkeypatch.setattr("unlearn.evaluation.plots.find_spec", lambda name: None)
    main(world.flags("--output", str(tmp_path / "plain")))
    assert (
        "No plots: matplotlib is not installed (pip install -e .[plots])."
        in capsys.readouterr().out
    )
    assert not list((tmp_path / "plain").glob("*.png")) and (tmp_path / "plain/lds.csv").exists()


def test_what_the_models_make_again_is_shown_where_retrain_left_it(world, tmp_path):
    main(world.flags())
    assert not (tmp_path / "out/made_again.jpg").exists()
    for path in (tmp_path / "root/synth/queries").iterdir():
        Image.new("RGB", (8, 8), "red").save(path)
    world.digests = query_digests(
        load_tasks(tmp_path / "tasks.json", tmp_path / "root"), tmp_path / "root"
    )
    for model in world.retrained.iterdir():
        world.edit(model.name, lambda record: record["identity"].update(queries=world.digests))
    path = tmp_path / "results/retrain/without-ours-00001-k4/pictures" / f"{QUERIES[1]}.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), "blue").save(path)
    main(world.flags())
    with Image.open(tmp_path / "out/made_again.jpg") as picture:
        red, _, blue = np.asarray(picture.convert("RGB"), int).transpose(2, 0, 1)
    assert (red - blue > 150).any() and (blue - red > 150).any()


def remove(name):
    return lambda world: (world.retrained / name).unlink()


def edit(name, key, value):
    return lambda world: world.edit(name, lambda record: record["identity"].update({key: value}))


def copy(name, new, change=lambda record: None):
    def act(world):
        (world.retrained / new).write_bytes((world.retrained / name).read_bytes())
        world.edit(new, change)

    return act


BAD_WORLDS = [
    (
        lambda world: [path.unlink() for path in world.retrained.iterdir()],
        "retrained: has no retrained models; make them: python -m",
    ),
    (
        lambda world: world.retrained.rename(world.folder / "gone"),
        "--retrained .*retrained: no such folder",
    ),
    (
        edit("half-003.json", "recipe", "other"),
        "half-003.json: made otherwise than full-seed0.json: recipe is 'other', expected "
        "'recipe' .how the model was trained.; models of one folder",
    ),
    (
        edit("half-003.json", "timesteps", 20),
        "half-003.json: made otherwise than full-seed0.json: timesteps is 20, expected 200",
    ),
    (
        edit("random-k4-000.json", "noise_seed", 1),
        "random-k4-000.json: made otherwise than full-seed0.json: noise_seed is 1, expected 0",
    ),
    (
        edit("half-003.json", "queries", "others"),
        "half-003.json: queries: expected dict, found 'others'",
    ),
    (
        lambda world: (world.folder / "root/synth/queries/00001.png").write_bytes(b"another"),
        "full-seed0.json: was measured on another prompt, picture, seed or stored latent of "
        "query queries/00001 than .*; measure the models on",
    ),
    (
        edit("half-003.json", "format_version", 2),
        "half-003.json: expected format_version 1 .* found 2 and 'subset'",
    ),
    (
        edit("half-003.json", "members", "AAAA"),
        "half-003.json: members: expected the packed mask of 41 images, found 3 bytes",
    ),
    (
        edit("half-003.json", "members", "*"),
        "half-003.json: members: expected the packed mask of 41 images, found 0 bytes",
    ),
    (edit("half-003.json", "seed", "0"), "half-003.json: seed: expected int, found '0'"),
    (
        edit("full-seed1.json", "members", base64.b64encode(bytes([255] * 5 + [0])).decode()),
        "full model trained without 1 of 41",
    ),
    (
        lambda world: (world.retrained / "notes.txt").write_text(""),
        "retrained/notes.txt: no file of a retrained model",
    ),
    (
        lambda world: (world.retrained / "half-0.json").write_text("{"),
        "retrained model .*half-0.json: not valid JSON",
    ),
    (
        lambda world: write_json(world.retrained / "half-0.json", []),
        "half-0.json: identity: expected dict, found None",
    ),
    (
        copy("half-003.json", "half-9.json"),
        "half-9.json: the same model as half-003.json .*it would count twice",
    ),
    (
        lambda world: world.edit("half-003.json", lambda record: record["losses"].pop(QUERIES[2])),
        "half-003.json: has no loss of query queries/00002 .it has 4.; it was measured on "
        "another task file",
    ),
    (
        lambda world: world.edit(
            "half-003.json", lambda record: record["losses"].update({QUERIES[2]: float("nan")})
        ),
        "half-003.json: losses: queries/00002: expected a finite number, found nan",
    ),
    (
        lambda world: world.edit(
            "without-ours-00001-k4.json", lambda record: record["removed"].update(k=5)
        ),
        "without-ours-00001-k4.json: removed: k is 5, its mask leaves out 4 images",
    ),
    (
        lambda world: world.edit(
            "without-ours-00001-k4.json", lambda record: record["removed"].update(query=None)
        ),
        "without-ours-00001-k4.json: query: expected str, found None",
    ),
    (
        edit("half-003.json", "queries", dict.fromkeys(QUERIES, "each")),
        "half-003.json: made otherwise than .*json: query queries/00000 has another picture, "
        "prompt, seed or stored latent; models of one folder",
    ),
    (
        lambda world: [
            edit(
                path.name, "queries", {**dict.fromkeys(QUERIES, "same"), QUERIES[2]: path.name[:4]}
            )(world)
            for path in world.retrained.iterdir()
        ],
        "half-000.json: made otherwise than .*json: query queries/00002 has another picture",
    ),
    (
        lambda world: world.save_influence("ours", -world.effect),
        "without-ours-00000-k4.json: was trained without other images than the first 4 of ours "
        "for queries/00000: the scores were made",
    ),
    (
        lambda world: [
            path.unlink()
            for path in world.retrained.glob("half-0[01]*")
            if path.name > "half-000.json"
        ],
        "retrained: the LDS needs at least 3 models on random subsets of one size and seed, "
        "found 1; make more",
    ),
    (
        lambda world: (
            [
                edit(path.name, "seed", 1)(world)
                for path in list(world.retrained.glob("half-0*"))[2:]
            ]
            and [(world.retrained / f"half-{number:03d}.json").unlink() for number in range(10)]
        ),
        "of one size and seed, found [12]; make more",
    ),
    (
        remove("full-seed0.json"),
        "without-ours-00000-k4.json: there is no full model of its seed 0 to compare it with .12 "
        "such models.; train it: "
        "python -m unlearn retrain full --seeds 0 --task_json .*tasks.json --dataroot .*root "
        "--result_dir .*results --output .*retrained$",
    ),
    (
        edit("without-pixel-00002-k4.json", "seed", 2),
        "without-pixel-00002-k4.json: there is no full model of its seed 2 to compare it with .1 "
        "such "
        "models.; train it: python -m unlearn retrain full --seeds 2 ",
    ),
    (
        lambda world: [
            world.edit(
                f"full-seed{seed}.json",
                lambda record: record["mse"].update({QUERIES[1]: 0.01 + seed}),
            )
            for seed in (0, 1)
        ],
        "full-seed0.json: is not the model that made the queries, .* an MSE of up to 1.0e-02 "
        ".*Train the one that did.* --seeds 2 ",
    ),
    (
        lambda world: [
            world.edit(f"full-seed{seed}.json", lambda record: record.update(mse=None))
            for seed in (0, 1)
        ],
        "full-seed[01].json: does not say what it makes of the queries' prompts and seeds, "
        ".*measure it with pictures: python -m unlearn retrain",
    ),
    (
        lambda world: world.save_influence("ours", world.effect, training_set="other"),
        "pixel: scores 41 training images, ours 41, the same by name, but of another data root, "
        "or encoded by another model",
    ),
    (
        lambda world: [
            world.save_influence(method, world.effect, training_set="other")
            for method in ("ours", "pixel")
        ],
        "--result_dir .*: ours scores 41 training images, the models of --retrained were trained "
        "on 41 others: of another data root or encoding",
    ),
    (
        lambda world: (
            world.folder / "results/baselines/pixel" / QUERIES[3] / "influence.npz"
        ).unlink(),
        "00003/influence.npz: no such file; make it: python -m unlearn baselines --task_json .* "
        "--methods pixel, or name the finished",
    ),
    (
        lambda world: (world.folder / "results/influence" / QUERIES[3] / "influence.npz").unlink(),
        "00003/influence.npz: no such file; make it: python compute_influence.py --task_json ",
    ),
    (
        lambda world: write_record(
            world.folder / "results/influence" / QUERIES[3] / "influence.npz",
            {"settings": {"unlearn_lr": 3}, "candidates": ["set"]},
        ),
        "00003/influence.npz: made otherwise than .*00000/influence.npz: unlearn_lr is 3, "
        "expected None .alpha of the Newton update.; only queries scored alike can be averaged",
    ),
    (
        lambda world: write_record(
            world.folder / "results/influence" / QUERIES[3] / "influence.npz", {}
        ),
        "00003/influence.json: does not say which training set was ranked",
    ),
]


@pytest.mark.parametrize("damage, text", BAD_WORLDS)
def test_what_cannot_be_evaluated_ends_in_one_line_that_names_it_and_nothing_is_written(
    world, damage, text
):
    damage(world)
    with pytest.raises(UserError, match=text) as error:
        main(world.flags())
    assert "\n" not in str(error.value) and not (world.folder / "out").exists()


def test_damaged_or_incomplete_scores_are_refused(world, tmp_path):
    main(world.flags())
    path = tmp_path / "out/scores/ours.npz"
    flags = world.flags("--scores", str(tmp_path / "out/scores"))
    with pytest.raises(
        UserError,
        match="--methods dtrak: --scores .*scores has no scores of it; it has: ours, pixel",
    ):
        main([*flags, "--methods", "ours", "dtrak"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match="ours.npz: its content is not what its record says"):
        main(flags)
    path.write_bytes(whole)
    entries = json.loads((tmp_path / "tasks.json").read_text())
    world.queries = [*QUERIES, "queries/new"]
    (tmp_path / "root/synth/queries/new.png").write_bytes(b"")
    write_json(
        tmp_path / "tasks.json",
        [*entries, {**entries[0], "synth_image_path": "synth/queries/new.png"}],
    )
    digests = query_digests(
        load_tasks(tmp_path / "tasks.json", tmp_path / "root"), tmp_path / "root"
    )
    for model in world.retrained.iterdir():
        world.edit(
            model.name,
            lambda record: (
                record["losses"].update({"queries/new": 1.0}),
                record["identity"].update(queries=digests),
            ),
        )
    with pytest.raises(UserError, match="ours.npz: has no scores of query queries/new .it has 5."):
        main(flags)


def test_queries_without_exemplars_need_retrained_models_and_flags_of_one_kind_are_refused_with_the_other(
    world,
):
    flags = world.flags()
    place = flags.index("--retrained")
    without = flags[:place] + flags[place + 2 :]
    with pytest.raises(
        UserError, match="such queries are evaluated by retraining: give --retrained DIR"
    ):
        main(without)
    with pytest.raises(UserError, match="--methods: only with --retrained DIR"):
        main([*without, "--methods", "ours"])
    with pytest.raises(UserError, match="--features: not with --retrained"):
        main([*flags, "--features", "some/clip"])


def test_influence_files_of_a_customized_model_are_refused(world):
    path = world.folder / "results/influence" / QUERIES[0] / "influence.npz"
    arrays = dict(np.load(path))
    arrays["is_exemplar"][0] = True
    np.savez(path, **arrays)
    write_record(path, {"candidates": [TRAINING_SET]})
    with pytest.raises(
        UserError,
        match="00000/influence.npz: ranks exemplars of a customized model; --retrained evaluates",
    ):
        main(world.flags())
