"""Tokenizers of three families, made in the test: SentencePiece with Mistral's vocabulary, byte-level BPE, ChatML."""

from functools import cache
from pathlib import Path
from typing import Any

import mistral_common
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MISTRAL_CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITH_MARKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML_WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools|tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n' + call|tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = ["hello world, what is the capital of France? Paris.", "Q: two plus two?\nA: four", "a user and an assistant"]


def sentencepiece_file() -> Path:
    """Mistral v3's own SentencePiece model, which comes with mistral-common."""
    return Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@cache
def sentencepiece_backend(always_prepend: bool = False) -> str:
    """That model as a BPE of the tokenizers library, as JSON; merges are ranked by their piece's score.

    All runs of blanks have one score, and then SentencePiece joins the leftmost pair: a run grows from its left end.
    Merges with the longest left part first do the same.

    The blank before a text is added as `Metaspace` does it (where there is none) or, as older conversions do, always.
    """
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time by protobuf
    model.ParseFromString(sentencepiece_file().read_bytes())
    ids = {piece.piece: id for id, piece in enumerate(model.pieces)}
    merges = [
        (-piece.score, -len(left) if left.strip("▁") == "" else 0, ids[left], ids[right], left, right)
        for piece in model.pieces
        if piece.type == piece.NORMAL
        for k in range(1, len(piece.piece))
        if (left := piece.piece[:k]) in ids and (right := piece.piece[k:]) in ids
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    backend = Tokenizer(models.BPE(vocab=ids, merges=pairs, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    if always_prepend:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls = [piece.piece for piece in model.pieces if piece.type == piece.CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    return str(backend.to_str())


def wrap(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """`backend` as a transformers tokenizer, whose constructor has no types."""
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=backend, **options)  # type: ignore[no-untyped-call]
    return tokenizer


def mistral_tokenizer(*, always_prepend: bool = False) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with Mistral v3's real vocabulary."""
    return wrap(
        Tokenizer.from_str(sentencepiece_backend(always_prepend)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


@cache
def byte_level_backend(controls: tuple[str, ...]) -> str:
    """A byte-level BPE of a few hundred tokens, as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(controls), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return str(backend.to_str())


def byte_level_mistral(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Mistral's control tokens, as the quick start trains it."""
    backend = Tokenizer.from_str(byte_level_backend(tuple(MISTRAL_CONTROL_TOKENS)))
    tokenizer = wrap(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def chatml_tokenizer(template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens; its EOS closes every message."""
    backend = Tokenizer.from_str(byte_level_backend(("<|endoftext|>", "<|im_start|>", "<|im_end|>")))
    options = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>", "<|endoftext|>"], **options}
    tokenizer = wrap(backend, **options)
    tokenizer.chat_template = template
    return tokenizer
