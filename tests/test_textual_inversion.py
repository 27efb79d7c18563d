"""New words (textual inversion): read as diffusers reads them, and nothing else."""

import shlex
import shutil
from functools import partial

import pytest
import torch
from conftest import PARITY
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from test_attribute import PROMPT, QUERY, make_folder
from tiny_families import make_pipeline

import unlearn
from unlearn import UserError
from unlearn.datasets.conditioning import TEXT
from unlearn.datasets.encoders import count_tokens
from unlearn.front.embeddings import tell_words
from unlearn.front.loading import check_prompts, load_source
from unlearn.front.questions import Question
from unlearn.models.embeddings import Embedding, check_embedding, list_tokens, read_embedding
from unlearn.models.lora_files import read_lora
from unlearn.models.lora_names import parse_name

TINY = str(PARITY / "fixture/sd-tiny")


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)


@pytest.fixture(scope="module")
def features(pipeline):
    return pipeline.text_encoder.config.hidden_size


def make_vectors(count, features, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed))


def test_prompts_with_new_words_are_read_as_diffusers_reads_them(tmp_path, pipeline, features):
    one, three = make_vectors(1, features), make_vectors(3, features, 1)
    save_file({"<one>": one[0]}, tmp_path / "a.safetensors")
    save_file({"emb_params": three}, tmp_path / "b.safetensors")
    shutil.move(tmp_path / "b.safetensors", tmp_path / "<three>.bin")  # its content decides
    given = [str(tmp_path / "a.safetensors"), str(tmp_path / "<three>.bin")]
    words = [read_embedding(name) for name in given]
    assert [(each.token, each.count) for each in words] == [("<one>", 1), ("<three>", 3)]
    source, model = load_source(TINY, None, tmp_path / "model", "cpu", (), words)
    prompts = ["a <one> on a table", "<three>, a photo of <three> and <one>", "a blob"]
    pipeline.load_textual_inversion({"<one>": one})
    pipeline.load_textual_inversion({"<three>": three})
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    torch.testing.assert_close(model.encode_prompts(prompts)[TEXT], expected)
    plain = unlearn.load_model(TINY, "cpu").encode_prompts(prompts)[TEXT]
    torch.testing.assert_close(model.encode_prompts(prompts)[TEXT][2], plain[2])
    assert (model.encode_prompts(prompts)[TEXT][:2] - plain[:2]).abs().max() > 0.01
    assert count_tokens(model.reader[0], ["<three>"]) == [5]
    again, _ = load_source(TINY, None, tmp_path / "model", "cpu", (), words)
    assert again == source
    with pytest.raises(UserError, match="knows <one> already; give the word another name"):
        list_tokens(model.pipeline, words[:1])


def test_a_word_is_the_one_given_else_the_files_key_or_name(tmp_path, features):
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"<cat>": make_vectors(1, features)}, folder / "learned_embeds.safetensors")
    save_file({"<cat>": make_vectors(1, features)}, folder / "learned_embeds-500.safetensors")
    assert read_embedding(str(folder)).token == "<cat>"
    assert read_embedding(f"{folder}:<dog>").token == "<dog>"
    assert Embedding(folder, "<x>", {"": make_vectors(2, features)}).names == ["<x>", "<x>_1"]


def test_what_is_no_new_word_is_refused_in_one_line(tmp_path, features):
    path = tmp_path / "e.safetensors"

    def said(tensors, name=str(path)):
        save_file(tensors, path)
        with pytest.raises(UserError) as error:
            read_embedding(name)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "expected one word's embedding, found clip_g" in said({"clip_g": torch.ones(1, 8)})
    assert "found 1 of clip_l and 2 of clip_g" in said(
        {"clip_l": torch.ones(1, 4), "clip_g": torch.ones(2, 8)}
    )
    assert "expected one word's embedding, found" in said(
        {"<a>": torch.ones(4), "<b>": torch.ones(4)}
    )
    assert "found the shape [2, 2, 2]" in said({"<a>": torch.ones(2, 2, 2)})
    assert "found the shape [99, 2]" in said({"<a>": torch.ones(99, 2)})
    assert "NaN or infinite" in said({"<a>": torch.tensor([1.0, float("nan")])})
    assert "expected one word after the colon" in said({"<a>": torch.ones(4)}, f"{path}:two words")
    assert "no such file" in said({"<a>": torch.ones(4)}, str(tmp_path / "none.safetensors"))
    assert "expected one word, found a b" in said({"a b": torch.ones(4)})
    torch.save({"<a>": torch.ones(4)}, tmp_path / "e.bin")
    refused = said({"<a>": torch.ones(4)}, str(tmp_path / "e.bin"))
    assert "expected safetensors; convert it, where you trust it: python -c" in refused


def test_the_command_that_converts_a_pickle_runs_and_gives_the_word(tmp_path, features):
    path, vectors = tmp_path / "word's.pt", make_vectors(2, features)
    torch.save({"string_to_param": {"*": vectors}, "name": "x"}, path)
    with pytest.raises(UserError) as error:
        read_embedding(str(path))
    python, flag, code = shlex.split(str(error.value).split("where you trust it: ")[1])
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    found = read_embedding(str(path.with_suffix(".safetensors")))
    assert found.token == "word's"
    torch.testing.assert_close(found.tables[""], vectors)


def test_a_word_of_another_base_and_a_model_without_such_words_are_refused(tmp_path, features):
    pipeline = unlearn.load_model(TINY, "cpu").pipeline
    with pytest.raises(UserError, match=f"text encoder has {features}: it was trained for another"):
        check_embedding(pipeline, Embedding(tmp_path, "<x>", {"": torch.ones(1, features + 1)}))
    with pytest.raises(UserError, match="object takes none so far; supported are"):
        check_embedding(object(), Embedding(tmp_path, "<x>", {"": torch.ones(1, features)}))
    word = Embedding(tmp_path, "<x>", {"": torch.ones(1, features)})
    with pytest.raises(UserError, match="is in another file too"):
        list_tokens(pipeline, [word, word])


def test_a_file_that_is_none_is_refused_before_a_model_is_loaded(tmp_path):
    folder = make_folder(tmp_path / "mine", 2)
    with pytest.raises(UserError, match="no such file"):
        unlearn.attribute(QUERY, "nowhere", folder, PROMPT, textual_inversion="none.safetensors")
    assert tell_words([], None, []) == []


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """The tiny pipeline of Stable Diffusion XL, its folder, and features of its two text encoders."""
    pipeline, folder = make_pipeline("sdxl"), tmp_path_factory.mktemp("xl") / "pipeline"
    pipeline.save_pretrained(folder)
    return pipeline, folder, (8, 16)


def test_words_of_two_text_encoders_are_read_as_diffusers_reads_them(xl, tmp_path):
    """Of textual inversion, by the file's name, and of pivotal tuning, whose rows are words."""
    pipeline, folder, features = xl
    first, second, *rows = (
        make_vectors(count, width, count) for count in (3, 2) for width in features
    )
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "<cat>.safetensors")
    tuned = {"text_encoders_0": rows[0], "text_encoders_1": rows[1]}
    save_file(tuned, tmp_path / "run_emb.safetensors")
    words = [read_embedding(str(tmp_path / f"{name}.safetensors")) for name in ("<cat>", "run_emb")]
    assert [each.names for each in words] == [["<cat>", "<cat>_1", "<cat>_2"], ["<s0>", "<s1>"]]
    assert [each.words for each in words] == [["<cat>"], ["<s0>", "<s1>"]]
    _, model = load_source(folder, None, tmp_path / "model", "cpu", (), words)
    prompts = ["a <cat> on red", "<s0><s1>, a photo", "a dog"]
    encode = partial(
        pipeline.encode_prompt, prompts, device="cpu", do_classifier_free_guidance=False
    )
    with torch.no_grad():
        plain = encode()[0]
    for tables, names in (((first, second), "<cat>"), (rows, ["<s0>", "<s1>"])):
        for vectors, end in zip(tables, ("", "_2")):
            pipeline.load_textual_inversion(
                vectors if isinstance(names, str) else list(vectors),
                token=names,
                text_encoder=getattr(pipeline, f"text_encoder{end}"),
                tokenizer=getattr(pipeline, f"tokenizer{end}"),
            )
    with torch.no_grad():
        expected, _, pooled, _ = encode()
    found = model.encode_prompts(prompts)
    torch.testing.assert_close(found[TEXT], expected)
    torch.testing.assert_close(found["pooled"], pooled)
    torch.testing.assert_close(found[TEXT][2], plain[2])
    assert all(
        (found[TEXT][row, :, part] - plain[row, :, part]).abs().max() > 0.01
        for row in (0, 1)
        for part in (slice(0, 8), slice(8, 24))
    )
    with pytest.raises(UserError, match="tokenizer knows <s0> already"):
        check_embedding(model.pipeline, words[1])


def test_words_for_other_text_encoders_than_the_models_are_refused(xl, pipeline, tmp_path):
    left = torch.ones(1, 8)
    one, two = (
        Embedding(tmp_path, "<x>", tables)
        for tables in ({"": left}, {"clip_l": left, "clip_g": torch.ones(1, 9)})
    )
    with pytest.raises(
        UserError, match="vectors for one text encoder, the model takes them for clip_l and clip_g"
    ):
        check_embedding(xl[0], one)
    with pytest.raises(
        UserError, match="vectors of 9 numbers, the model's second text encoder has 16"
    ):
        check_embedding(xl[0], two)
    with pytest.raises(
        UserError, match="vectors for clip_l and clip_g, .* for one text encoder: it was"
    ):
        check_embedding(pipeline, two)


def learn(pipeline, part, names, vectors):
    """Gives a text encoder of a pipeline new words, by transformers alone."""
    tokenizer = getattr(pipeline, part.replace("text_encoder", "tokenizer"))
    encoder = getattr(pipeline, part)
    tokenizer.add_tokens(names)
    if len(tokenizer) > len(encoder.get_input_embeddings().weight):
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for number, vector in zip(tokenizer.convert_tokens_to_ids(names), vectors):
        encoder.get_input_embeddings().weight.data[number] = vector


def make_evaluated(family):
    """The tiny pipeline of a family without T5's dropout."""
    pipeline = make_pipeline(family)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


PARTS = {
    "sd3": {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    "flux": {"clip_l": "text_encoder", "t5": "text_encoder_2"},
}


@pytest.mark.parametrize("with_t5", [False, True])
@pytest.mark.parametrize("family", PARTS)
def test_words_of_stable_diffusion_3_and_flux_are_read_by_the_encoders_that_the_file_has(
    family, with_t5, tmp_path
):
    """T5 reads them as other text where the file has no vectors for it, as diffusers' pipeline and
    training script of FLUX.1 have it."""
    pipeline, folder = make_evaluated(family), tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    tensors = {
        key: make_vectors(2, getattr(pipeline, part).get_input_embeddings().weight.shape[1], number)
        for number, (key, part) in enumerate(PARTS[family].items())
        if with_t5 or not key.startswith("t5")
    }
    save_file(tensors, tmp_path / "run_emb.safetensors")
    word = read_embedding(f"{tmp_path / 'run_emb.safetensors'}:<s0><s1>")
    assert word.names == ["<s0>", "<s1>"]
    _, model = load_source(folder, None, tmp_path / "model", "cpu", (), [word])
    prompts = ["<s0><s1> on red", "a dog"]
    plain = model.family.encode_prompts(pipeline, prompts)
    for key, vectors in tensors.items():
        learn(pipeline, PARTS[family][key], word.names, vectors)
    expected = model.family.encode_prompts(pipeline, prompts)
    found = model.encode_prompts(prompts)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
        torch.testing.assert_close(value[1], plain[name][1])
    changed = [(expected[name][0] - plain[name][0]).abs().max() > 1e-3 for name in expected]
    assert changed == [with_t5 or family == "sd3", True], "the text, and the pooled text"
    check_prompts(model, [Question(tmp_path / "x.png", prompts[0])])
    with pytest.raises(UserError, match="<s0> would be cut off"):
        check_prompts(model, [Question(tmp_path / "x.png", "a dog " * 9 + "<s0>")])
    with pytest.raises(UserError, match="no token <s2>"):
        check_prompts(model, [Question(tmp_path / "x.png", "a <s2>")])


def test_diffusers_reads_a_word_of_flux_alike(tmp_path):
    """Of several vectors, in both of its text encoders."""
    pipeline, folder = make_evaluated("flux"), tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    clip, t5 = make_vectors(3, 16), make_vectors(3, 24, 1)
    save_file({"clip_l": clip, "t5xxl": t5}, tmp_path / "<cat>.safetensors")
    words = [read_embedding(str(tmp_path / "<cat>.safetensors"))]
    _, model = load_source(folder, None, tmp_path / "model", "cpu", (), words)
    for vectors, end in ((clip, ""), (t5, "_2")):
        encoder, tokenizer = (
            getattr(pipeline, f"{part}{end}") for part in ("text_encoder", "tokenizer")
        )
        pipeline.load_textual_inversion(
            vectors, token="<cat>", text_encoder=encoder, tokenizer=tokenizer
        )
    prompts = ["a <cat> on red", "a dog"]
    with torch.no_grad():
        expected, pooled, _ = pipeline.encode_prompt(prompts, None, "cpu", max_sequence_length=16)
    found = model.encode_prompts(prompts)
    torch.testing.assert_close(found[TEXT], expected)
    torch.testing.assert_close(found["pooled"], pooled)


def test_a_word_of_diffusers_pivotal_tuning_of_stable_diffusion_1_is_read(
    pipeline, features, tmp_path
):
    save_file({"clip_l": make_vectors(2, features)}, tmp_path / "run_emb.safetensors")
    word = read_embedding(f"{tmp_path / 'run_emb.safetensors'}:<s0><s1>")
    [(place, tokens)] = list_tokens(unlearn.load_model(TINY, "cpu").pipeline, [word]).items()
    assert place == ("text_encoder", "tokenizer") and list(tokens) == ["<s0>", "<s1>"]


@pytest.mark.parametrize(
    "family, keys, said",
    [
        ("sd3", ["clip_l"], "for clip_l, the model takes them for clip_l and clip_g and t5xxl"),
        ("flux", ["clip_l", "clip_g"], "for clip_l and clip_g, .* for clip_l and t5xxl: it was"),
        ("sd3-without-t5", ["clip_l", "clip_g", "t5xxl"], "and t5xxl, .* for clip_l and clip_g:"),
        ("pixart", ["clip_l"], "PixArtAlphaPipeline takes none so far; supported are .*FLUX.1"),
    ],
)
def test_words_of_another_base_are_refused_by_their_encoders(family, keys, said, tmp_path):
    save_file({key: torch.ones(1, 8) for key in keys}, tmp_path / "x.safetensors")
    word = read_embedding(str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match=f"x.safetensors: .*{said}"):
        check_embedding(make_pipeline(family), word)


def test_a_lora_with_its_embeddings_inside_is_taken_apart_by_the_command_that_is_said(tmp_path):
    layer, path = "lora_unet_mid_block_x", tmp_path / "both.safetensors"
    lora = {f"{layer}.lora_{kind}.weight": torch.ones(2, 2) for kind in ("down", "up")}
    words = {
        "bundle_emb.cat.string_to_param.*": make_vectors(2, 4),
        "bundle_emb.dog.clip_l": make_vectors(1, 4),
        "bundle_emb.dog.clip_g": make_vectors(1, 8),
    }
    save_file({**lora, **words}, path, {"ss_network_dim": "2"})
    with pytest.raises(UserError) as error:
        read_lora(parse_name(str(path)))
    assert "\n" not in str(error.value)
    exec(shlex.split(str(error.value).split("--textual_inversion): ")[1])[2], {})
    found = read_lora(parse_name(str(tmp_path / "both-lora.safetensors")))
    assert set(found.keys) == lora.keys() and found.header == {"ss_network_dim": "2"}
    cat, dog = (read_embedding(str(tmp_path / f"{word}.safetensors")) for word in ("cat", "dog"))
    assert (cat.token, dog.token) == ("cat", "dog")
    assert torch.equal(cat.tables[""], words["bundle_emb.cat.string_to_param.*"])
    assert torch.equal(dog.tables["clip_g"], words["bundle_emb.dog.clip_g"])
