"""Customized models: a base model's K and V replaced, and new tokens, checked before they are used."""

import re
from contextlib import contextmanager
from pathlib import Path

import torch

from . import UserError
from .hashes import digest, hash_tensors
from .models import Model, replaced_weights
from .reading import read_tensors, resolve_inside
from .unets import check_shapes

CUSTOMIZED_WEIGHTS = "pytorch_custom_diffusion_weights.pt"
TOKEN = re.compile(r"<[\w-]{1,40}>", re.ASCII)


def read_customization(model_dir):
    """Weights by parameter name and embeddings by new token of a customized model. Raises UserError where there are none
    or some are not finite."""
    weights = read_tensors(resolve_inside(model_dir, CUSTOMIZED_WEIGHTS, f"{model_dir}"), "customized weights")
    tokens = {}
    for path in sorted(Path(model_dir).glob("*.bin")):
        tokens.update(read_tensors(resolve_inside(model_dir, path.name, f"{model_dir}"), "token embedding"))
    if odd := [token for token in tokens if not TOKEN.fullmatch(token)]:  # a word of the vocabulary would change other models
        raise UserError(f"{model_dir}: {odd[0]!a:.80}: expected new tokens such as <new1>")
    if not weights:
        raise UserError(f"{Path(model_dir) / CUSTOMIZED_WEIGHTS}: holds no weights")
    for name, value in {**weights, **tokens}.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{model_dir}: {name} has NaN or infinite entries; download the customized model again")
    return weights, tokens


def check_tokens(model_dir, tasks):
    """Raises UserError where a prompt of a model's tasks names a token, like <new1>, that the model (None: the base model)
    does not bring."""
    prompts = [prompt for task in tasks for prompt in (task.train_prompt, task.prompt) if prompt is not None]
    missing = set(re.findall(r"<new\d+>", " ".join(prompts))) - (read_customization(model_dir)[1].keys() if model_dir else set())
    if missing and not model_dir:
        task = next(task for task in tasks if min(missing) in task.prompt)
        raise UserError(f"{task.synth_image_path}: the base model has no token {min(missing)}, which its prompt uses; give the "
                        "task the test_case, test_case_ind, model_path and train_prompt of the customized model that has it")
    if missing:
        raise UserError(f"{model_dir}: no embedding (*.bin) of {min(missing)}, which its prompts use; download the model again")


def check_customization(model, model_dir):
    """A customized model's weights and tokens (`read_customization`), none for None, the base model. Raises UserError where
    one does not fit the model."""
    if model_dir is None:
        return {}, {}
    weights, tokens = read_customization(model_dir)
    check_shapes(Path(model_dir) / CUSTOMIZED_WEIGHTS, weights, dict(model.denoiser.named_parameters()), "weight")
    features = model.embedding_shape[1]
    for token, vector in tokens.items():
        if vector.shape != (features,):
            raise UserError(f"{model_dir}: token {token}: expected {features} numbers, found {list(vector.shape)}")
    return weights, tokens


def add_tokens(pipeline, tokens):
    """Gives the tokenizer new tokens and the text encoder their embeddings (an earlier model's of that name are replaced). Raises
    UserError where the tokenizer gives a token a number that the text encoder does not have."""
    embeddings = pipeline.text_encoder.get_input_embeddings()
    pipeline.tokenizer.add_tokens(list(tokens))
    if len(pipeline.tokenizer) > len(embeddings.weight):
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    for token, vector in tokens.items():
        if not 0 <= (number := pipeline.tokenizer.convert_tokens_to_ids(token)) < len(weight):
            raise UserError(f"the pipeline's tokenizer numbers {token} {number}, its text encoder has {len(weight)} tokens: one of them is damaged")
        weight.data[number] = vector.to(weight)


@contextmanager
def customized(model, model_dir):
    """The model with a customized model's K, V and tokens; yields it as a Model with its own hash. The base weights are
    restored at the end. Where `model_dir` is None it is the base model itself."""
    if model_dir is None:
        yield model
        return
    weights, tokens = check_customization(model, model_dir)
    add_tokens(model.pipeline, tokens)
    with replaced_weights(model.denoiser, weights):
        hashed = digest(model.weights_hash, hash_tensors(weights), hash_tensors(tokens))
        yield Model(model.pipeline, hashed, model.alpha_bars)
