"""Text encoders that several families have: prompts read by them, and whether their parts fit."""

from collections.abc import Sequence
from typing import Any

from ...datasets.encoders import expand_words
from ...errors import UserError
from .interface import Parts, Refuse


def read_tokens(
    pipeline: Any,
    encoder: str,
    tokenizer: str,
    prompts: Sequence[str],
    limit: int,
    special: bool = True,
) -> Any:
    """Tokens of prompts, padded and cut to `limit`: input_ids and attention_mask, int64 [n, limit].
    special: whether the tokenizer puts its tokens of beginning and end around them. Raises UserError where the text encoder has no embedding of one."""
    reader = getattr(pipeline, tokenizer)
    read = reader(
        expand_words(reader, prompts),
        padding="max_length",
        truncation=True,
        max_length=limit,
        add_special_tokens=special,
        return_tensors="pt",
    )
    tokens = read.input_ids
    known = len(getattr(pipeline, encoder).get_input_embeddings().weight)
    for prompt, row in zip(prompts, tokens) if int(tokens.max()) >= known else ():
        if int(row.max()) >= known:
            token = reader.convert_ids_to_tokens(int(row.max()))
            raise UserError(
                f"prompt {prompt!a:.80}: the tokenizer knows {token!s:.40}, the text encoder has "
                f"no embedding of it"
            )
    return read


def tokenize(
    tokenizer: Any, prompts: Sequence[str], limit: int, special: bool = True
) -> list[list[int]]:
    """The tokens that are read of prompts; special: as of `read_tokens`."""
    words, how = expand_words(tokenizer, prompts), {"padding": "max_length", "truncation": True}
    return tokenizer(words, max_length=limit, add_special_tokens=special, **how).input_ids


def count_read(tokenizer: Any, prompts: Sequence[str], limit: int) -> list[int]:
    """How many tokens are read of each prompt, without padding."""
    words = expand_words(tokenizer, prompts)
    read = tokenizer(words, truncation=True, max_length=limit, verbose=False)
    return [len(tokens) for tokens in read.input_ids]


def label(encoder: str) -> str:
    """A text encoder as messages name it: `text encoder`, `second text encoder`, ..."""
    return {"_2": "second ", "_3": "third "}.get(encoder[-2:], "") + "text encoder"


def check_clip(parts: Parts, encoder: str, refuse: Refuse) -> None:
    """Refuses a text encoder that is none of CLIP's kind."""
    text, name = parts.texts[encoder], parts.classes.get(encoder)
    for key in ("hidden_size", "max_position_embeddings", "vocab_size"):
        if not isinstance(text[key], int):
            refuse(
                f"its {label(encoder)}, {name}, has no {key}, as T5 has none of positions; expected "
                f"one like CLIPTextModel"
            )


def check_same_limit(parts: Parts, refuse: Refuse) -> None:
    """Refuses tokenizers of different lengths, whose texts are put side by side."""
    limits = {name: tokens.limit for name, tokens in parts.tokens.items()}
    if len(set(limits.values())) > 1:
        told = ", ".join(f"{name} {limit!s:.20}" for name, limit in limits.items())
        refuse(f"its tokenizers read prompts of different lengths (model_max_length: {told})")


def check_tokens(
    parts: Parts, encoder: str, tokenizer: str, refuse: Refuse, longest: int | None = None
) -> None:
    """Refuses a tokenizer of another model than its text encoder, or of longer prompts. longest:
    tokens that are read at most, where the tokenizer may say more."""
    text, tokens = parts.texts[encoder], parts.tokens[tokenizer]
    if longest and isinstance(tokens.limit, int):
        tokens = tokens._replace(limit=min(tokens.limit, longest))
    which = label(encoder).replace("text encoder", "tokenizer")
    if isinstance(tokens.vocabulary, int) and tokens.vocabulary > text["vocab_size"]:
        refuse(
            f"its {which} numbers {tokens.vocabulary} tokens, its {label(encoder)} has "
            f"{text['vocab_size']}: they are of different models"
        )
    most = text["max_position_embeddings"]
    if (
        most is not None
        and tokens.limit is not None
        and (not isinstance(tokens.limit, int) or not 2 < tokens.limit <= most)
    ):
        refuse(
            f"its {which}'s model_max_length: expected 3 to {most}, "
            f"as its {label(encoder)} has positions, "
            f"found {tokens.limit!s:.40}"
        )
