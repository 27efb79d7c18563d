"""Customized models: a base model's K and V replaced, and new tokens, checked before they are
used."""

import copy
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import AutoTokenizer

from ..datasets.encoders import count_tokens, find_unknown
from ..datasets.tasks import Task
from ..errors import UserError
from ..runtime.printing import shorten
from ..runtime.programs import log
from ..storage.hashes import digest, hash_tensors
from ..storage.reading import list_visible, read_tensors, resolve_inside
from ..storage.records import NAMES, named_input
from .pipelines import Model, replaced_weights
from .unets import check_shapes

CUSTOMIZED_WEIGHTS = (  # as the papers' authors name it, and as diffusers does
    "pytorch_custom_diffusion_weights.pt",
    "pytorch_custom_diffusion_weights.safetensors",
    "pytorch_custom_diffusion_weights.bin",
)
PROCESSED = re.compile(r"\.processor\.(to_\w+?)_custom_diffusion\.")
MOST_TOKEN = 16 << 20  # bytes of a file of embeddings whose name is no token's
TOKEN = re.compile(r"<[\w-]{1,40}>", re.ASCII)
BRACKETED = re.compile(
    "[<＜]([^<>＜＞]{1,60})[>＞]"
)  # what may be meant as a token, full-width brackets among them


def find_weights(model_dir: str | Path) -> Path:
    """The weights of a customized model, that of the authors' format first."""
    there = [name for name in CUSTOMIZED_WEIGHTS if os.path.lexists(Path(model_dir) / name)]
    return resolve_inside(model_dir, (there or CUSTOMIZED_WEIGHTS)[0], f"{model_dir}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Customized weights by the names of the UNet's parameters. diffusers names them by their
    attention processor: `attn2.processor.to_k_custom_diffusion.weight` is `attn2.to_k.weight`."""
    weights = read_tensors(path, "customized weights")
    return {PROCESSED.sub(r".\1.", name): value for name, value in weights.items()}


def read_token_file(path: Path, model_dir: str | Path) -> dict[str, torch.Tensor]:
    """Embeddings by new token, [n], of one file. Where its name is no token's, a file that holds
    something else (an optimizer's state, a difference of weights) gives none; else raises
    UserError."""
    is_named = bool(TOKEN.fullmatch(path.stem)) or path.stem == "learned_embeds"
    try:
        path = resolve_inside(model_dir, path.name, f"{model_dir}")
        if not is_named and path.stat().st_size > MOST_TOKEN:
            return {}
        tokens = read_tensors(path, "token embedding")
        if odd := [token for token in tokens if not TOKEN.fullmatch(token)]:
            # A word of the vocabulary would change other models.
            raise UserError(f"{model_dir}: {odd[0]!a:.80}: expected new tokens such as <new1>")
    except UserError:
        if is_named:
            raise
        return {}
    # Textual inversion keeps [1, n].
    return {
        token: vector[0] if vector.ndim == 2 and len(vector) == 1 else vector
        for token, vector in tokens.items()
    }


def read_customization(
    model_dir: str | Path,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights by parameter name and embeddings by new token of a customized model, as its authors'
    program and diffusers save it. Raises UserError where there are none or some are not finite."""
    path, tokens = find_weights(model_dir), {}
    weights = read_weights(path)
    for suffix in ("bin", "safetensors"):
        for file in list_visible(model_dir, f"*.{suffix}"):
            if file.name not in CUSTOMIZED_WEIGHTS:
                tokens.update(read_token_file(file, model_dir))
    if not weights:
        raise UserError(f"{Path(model_dir) / path.name}: holds no weights")
    for name, value in {**weights, **tokens}.items():
        if not torch.isfinite(value).all():
            raise UserError(
                f"{model_dir}: {name} has NaN or infinite entries; download the customized model "
                f"again"
            )
    return weights, tokens


def prompts_of(tasks: Iterable[Task], encoded: bool = False) -> dict[str, str]:
    """Prompts of tasks by what uses them, {name: prompt}; with `encoded` those alone that a text
    encoder will read."""
    prompts = {
        f"{task.model_path}: train_prompt": task.train_prompt
        for task in tasks
        if task.train_prompt is not None
    }
    return prompts | {
        task.synth_image_path: task.prompt for task in tasks if not (encoded and task.embeddings)
    }


def open_tokenizer(pipeline: str | Path) -> Any:
    """The tokenizer of a pipeline whose files are on this machine; None where they are not, or are
    damaged (`load_model` tells)."""
    try:
        return AutoTokenizer.from_pretrained(
            pipeline, subfolder="tokenizer", local_files_only=True, trust_remote_code=False
        )
    except Exception:  # what the library raises for a damaged file has no common type
        return None


def with_tokens(tokenizer: Any, tokens: Iterable[str]) -> Any:
    """A copy of a tokenizer that knows these tokens too."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(list(tokens))
    return copied


def is_token(tokenizer: Any, word: str) -> bool:
    """Whether a word in <> is a token of a tokenizer's own."""
    numbers = tokenizer(word, add_special_tokens=False).input_ids
    return len(numbers) == 1 and numbers[0] != tokenizer.unk_token_id


def find_strange(tokenizer: Any, prompts: Mapping[str, str]) -> tuple[str, str, str | None] | None:
    """The first word in <> that is no token of a tokenizer's own, (name of its prompt, word, the
    token that it is another spelling of or None); None where there is none. With spaces it is one
    only where a token is meant: `a < b > c` is not."""
    for name, prompt in prompts.items():
        for match in BRACKETED.finditer(prompt):
            if is_token(tokenizer, match[0]):
                continue
            plain = f"<{''.join(unicodedata.normalize('NFKC', match[1]).split())}>"
            if is_token(tokenizer, plain):
                return name, match[0], plain
            if re.fullmatch(r"[\w.*+-]+", match[1]):
                return name, match[0], None
    return None


def check_words(
    model_dir: str | Path | None, tokens: Iterable[str], tokenizer: Any, prompts: Mapping[str, str]
) -> None:
    """Raises UserError where a prompt has a word like <new1> that its model's tokenizer
    (`with_tokens` of its own) does not know."""
    if not (strange := find_strange(tokenizer, prompts)):
        return
    name, word, meant = strange
    if meant:
        raise UserError(
            f"{name}: {word} in its prompt is not read as the token {meant}; write {meant}"
        )
    if model_dir is None:
        raise UserError(
            f"{name}: the base model has no token {word}, which its prompt uses; give the task "
            f"the test_case, "
            "test_case_ind, model_path and train_prompt of the customized model that has it"
        )
    raise UserError(
        f"{model_dir}: no embedding (*.bin) of {word}, which its prompts use (it has "
        f"{', '.join(sorted(tokens)) or 'none'}); "
        "correct the prompt, or download the model again"
    )


def check_tokens(model_dir: str | Path | None, tasks: Iterable[Task], pipeline: str | Path) -> None:
    """`check_words` of a model's tasks (None: the base model) as far as that goes without a
    model."""
    prompts, tokens = prompts_of(tasks), read_customization(model_dir)[1] if model_dir else {}
    if any(
        match[0] not in tokens
        for prompt in prompts.values()
        for match in BRACKETED.finditer(prompt)
    ) and (tokenizer := open_tokenizer(pipeline)):
        check_words(model_dir, tokens, with_tokens(tokenizer, tokens), prompts)


def list_names(names: Sequence[str], most: int = 3) -> str:
    """Names with commas, the first few of many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def check_cut(tokenizer: Any, prompts: Mapping[str, str]) -> None:
    """Raises UserError where a token like <new1>, which a tokenizer knows, is cut off of a prompt,
    {name: prompt}."""
    limit = tokenizer.model_max_length
    for name, prompt in prompts.items():
        words = [word for word in TOKEN.findall(prompt) if is_token(tokenizer, word)]
        [count] = count_tokens(tokenizer, [prompt]) if words else [0]
        if count <= limit:
            continue
        whole, read = (
            tokenizer(prompt, truncation=truncation, max_length=limit, verbose=False).input_ids
            for truncation in (False, True)
        )
        for word in words:
            [number] = tokenizer(word, add_special_tokens=False).input_ids
            if whole.count(number) > read.count(number):
                raise UserError(
                    f"{name}: {word} would be cut off: its prompt has {count} tokens, the model "
                    f"reads the first {limit}; shorten the "
                    f"prompt, or put {word} first: {prompt:.200}"
                )


def check_lengths(tokenizer: Any, prompts: Mapping[str, str]) -> None:
    """Says which prompts, {name: prompt}, are longer than a tokenizer reads."""
    if not prompts:
        return
    limit, cut = tokenizer.model_max_length, []
    for name, count in zip(prompts, count_tokens(tokenizer, prompts.values())):
        if count <= limit:
            continue
        cut.append(f"{name} ({count})")
    if cut:
        log.warning(
            f"{len(cut)} prompts have more tokens than the {limit} that the model reads, their "
            f"ends are cut off: {list_names(cut)}"
        )


def check_known(tokenizer: Any, prompts: Mapping[str, str]) -> None:
    """Says which prompts, {name: prompt}, are empty, and of which a tokenizer does not know some.
    Raises UserError where it knows nothing of one."""
    if empty := [name for name, prompt in prompts.items() if not prompt.strip()]:
        log.warning(f"{len(empty)} prompts are empty: {list_names(empty)}")
    found = dict(zip(prompts, find_unknown(tokenizer, list(prompts.values()))))
    if lost := [name for name, (_, is_all) in found.items() if is_all]:
        raise UserError(
            f"{lost[0]}: the model's tokenizer knows no character of its prompt, nothing of it "
            f"would be read: "
            f"{prompts[lost[0]]:.200}; give the prompt in a script that the model reads"
        )
    if unknown := [name for name, (is_unknown, _) in found.items() if is_unknown]:
        log.warning(
            f"{len(unknown)} prompts have characters that the model's tokenizer does not know: "
            f"{list_names(unknown)}"
        )


def check_texts(tokenizer: Any, word_reader: Any, prompts: Mapping[str, str]) -> None:
    """What there is to say of prompts, {name: prompt}, that text encoders will read: `check_cut` by
    the tokenizer that knows new words, `check_lengths` and `check_known` by the one that reads the
    most."""
    check_cut(word_reader, prompts)
    check_lengths(tokenizer, prompts)
    check_known(tokenizer, prompts)


def tell_unused(
    model_dir: str | Path, tokens: Collection[str], tokenizer: Any, tasks: Iterable[Task]
) -> None:
    """Says where the train prompt of a customized model has none of its tokens: the exemplars'
    losses would not concern them."""
    numbers = set(tokenizer.convert_tokens_to_ids(list(tokens)))
    for prompt in sorted({task.train_prompt for task in tasks if task.train_prompt is not None}):
        if tokens and numbers.isdisjoint(
            tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        ):
            log.warning(
                f'{model_dir}: train_prompt "{shorten(prompt)}" has none of the model\'s tokens '
                f"({', '.join(sorted(tokens))}); "
                "correct it if the model was trained with them"
            )


def check_prompts(
    model: Model, model_dir: str | Path | None, tokens: Collection[str], tasks: Collection[Task]
) -> None:
    """What there is to say of a model's prompts when its tokenizer is loaded: `check_words`,
    `check_texts` and `tell_unused`."""
    if not tasks:
        return
    tokenizer = with_tokens(model.word_reader, tokens)
    check_words(model_dir, tokens, tokenizer, prompts_of(tasks))
    reader = with_tokens(model.reader[0], tokens)
    check_texts(reader, tokenizer, prompts_of(tasks, encoded=True))
    if model_dir is not None:
        tell_unused(model_dir, tokens, tokenizer, tasks)


def check_customization(
    model: Model, model_dir: str | Path | None, tasks: Collection[Task] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A customized model's weights and tokens (`read_customization`), none for None, the base
    model. Raises UserError where one does not fit the model, or the tokens do not fit the prompts
    of its tasks (`check_prompts`)."""
    if model_dir is None:
        check_prompts(model, None, {}, tasks)
        return {}, {}
    if not model.family.can_be_customized:
        raise UserError(
            f"{model_dir}: customized models (custom diffusion) are those of Stable Diffusion 1 and 2; "
            f"this model is of {model.family.name}"
        )
    weights, tokens = read_customization(model_dir)
    if model.lora:
        raise UserError(
            f"{model_dir}: a customized model, which replaces weights that --lora changes; give one "
            f"of the two"
        )
    check_shapes(
        Path(model_dir) / find_weights(model_dir).name,
        weights,
        dict(model.denoiser.named_parameters()),
        "weight",
    )
    features = model.embedding_shape[1]
    for token, vector in tokens.items():
        if vector.shape != (features,):
            raise UserError(
                f"{model_dir}: token {token}: expected {features} numbers, found "
                f"{list(vector.shape)}"
            )
    check_prompts(model, model_dir, tokens, tasks)
    return weights, tokens


def add_tokens(
    pipeline: DiffusionPipeline,
    tokens: Mapping[str, torch.Tensor],
    encoder: str = "text_encoder",
    tokenizer: str = "tokenizer",
) -> None:
    """Gives a tokenizer new tokens and its text encoder their embeddings (an earlier model's of
    that name are replaced). Raises UserError where the tokenizer gives a token a number that the
    text encoder does not have."""
    reader, module = getattr(pipeline, tokenizer), getattr(pipeline, encoder)
    embeddings = module.get_input_embeddings()
    reader.add_tokens(list(tokens))
    if len(reader) > len(embeddings.weight):
        module.resize_token_embeddings(len(reader), mean_resizing=False)
    weight = module.get_input_embeddings().weight
    for token, vector in tokens.items():
        if not 0 <= (number := reader.convert_tokens_to_ids(token)) < len(weight):
            raise UserError(
                f"the pipeline's {tokenizer} numbers {token} {number}, its {encoder} has "
                f"{len(weight)} tokens: one of them is damaged"
            )
        weight.data[number] = vector.to(weight)


@contextmanager
def customized(model: Model, model_dir: str | Path | None) -> Iterator[Model]:
    """The model with a customized model's K, V and tokens; yields it as a Model with its own hash.
    The base weights are restored at the end. Where `model_dir` is None it is the base model
    itself."""
    if model_dir is None:
        yield model
        return
    weights, tokens = check_customization(model, model_dir)
    add_tokens(model.pipeline, tokens)
    with (
        replaced_weights(model.denoiser, weights),
        named_input("model", f"{model_dir} on {NAMES.get('model')}"),
    ):
        hashed = digest(model.weights_hash, hash_tensors(weights), hash_tensors(tokens))
        yield replace(model, weights_hash=hashed)
