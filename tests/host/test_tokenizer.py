"""Prompts become the ids that transformers gives them, from the vocabulary in the repository and from written files."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from diffusers_reference import transformers

from handheld.errors import HandheldError
from handheld.models.tokenizer import ClipTokenizer, clip_tokenizer, read_tokenizer

ODD = (
    "a fox in the snow", "", "   ", "Ünïcödé Ångström e\u0301 café", "😀 family 👨‍👩‍👧‍👦 flag 🇩🇪",
    "東京の夜、雨 한국어 中文", "&amp; &lt;b&gt;", "1234567890 3.14 10,000 ½ ² Ⅷ ٣",
    "it's we'll I'd they've DON'T i'm 'S",
    "a\t\n b\r\n\u00a0c\u3000d", "<|startoftext|> hi <|endoftext|> x",
    "<|ENDOFTEXT|>", "ΟΔΥΣΣΕΥΣ", "İstanbul ß ﬁ \uff46\uff55ll", "“curly” — dash…",
    "x" * 300, "word " * 200, "!!!???...---***", "a_b-c/d\\e@f#g$%^&*()", "\u200bzero\u200dwidth\ufeff", "\x00\x01\x7f",
    "नमस्ते العربية עברית ไทย", "z\u0335a\u0321lgo K Å ℵ", "''s ..'t 's's",
)  # fmt: skip
SIGNS = (range(32, 127), range(0xA0, 0x250), range(0x370, 0x500), range(0x4E00, 0x5000), range(0x1F300, 0x1F650),
         range(0x300, 0x340), (9, 10, 32, 0xA0, 0x3000), range(1, 0xD800))  # fmt: skip


def texts() -> tuple[str, ...]:
    """Those above, and 300 of random signs of all scripts."""
    draw = random.Random(0)
    signs = [[chr(draw.choice(draw.choice(SIGNS))) for _ in range(draw.randrange(1, 60))] for _ in range(300)]
    return (*ODD, *map("".join, signs))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer().write(folder)
    return folder


@pytest.fixture(scope="module", params=["built", "read"])
def ours(request: Any, written: Path) -> ClipTokenizer:
    return clip_tokenizer() if request.param == "built" else read_tokenizer(written)


def test_ids_that_openai_published(ours: ClipTokenizer) -> None:
    """Of "a photo of a cat", as the model cards of CLIP have them."""
    ids = ours("A photo of a cat").ids
    assert ids.tolist() == [49406, 320, 1125, 539, 320, 2368] + [49407] * 71
    assert ids.dtype == "int32" and ours.size == 49408


def test_ids_are_those_of_transformers(ours: ClipTokenizer, written: Path) -> None:
    theirs = transformers().CLIPTokenizer(vocab=str(written / "vocab.json"), merges=str(written / "merges.txt"))
    for text in texts():
        expected = theirs(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours(text).ids.tolist() == expected, repr(text)


def test_written_files_are_read_by_others(written: Path) -> None:
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    assert theirs.encode("a photo of a cat").ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    vocabulary = json.loads((written / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(49408)) and vocabulary["<|endoftext|>"] == 49407
    assert len((written / "merges.txt").read_text().splitlines()) == 1 + 48894


def test_what_finds_no_room_is_told() -> None:
    tokens = clip_tokenizer()
    assert tokens("fox " * 75).dropped == ""
    long = tokens("fox " * 75 + "in the  Snow, at night ")
    assert long.dropped == "in the  Snow, at night" and long.ids[-1] == 49407
    assert tokens("É" * 2 + "x" * 3 + " fox" * 74 + " end").dropped


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(HandheldError, match="no valid Unicode: surrogates not allowed at place 1"):
        clip_tokenizer()("a\udcff")
    with pytest.raises(HandheldError, match=r"no file at .*tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HandheldError, match="is no tokenizer"):
        read_tokenizer(tmp_path)
