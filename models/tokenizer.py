"""CLIP's tokenizer: a prompt becomes 77 token ids. Needs `tokenizers`, the extra `pipelines`; no torch.

Byte-level BPE over OpenAI's vocabulary (`vocabulary/`, whose README says where it is from): the text in Unicode's NFC,
white space collapsed, in lower case; split into words, single digits and runs of other signs; each split into the
merges that rank first. The ids are those of transformers' CLIPTokenizer, which Stable Diffusion's pipelines use.
OpenAI's own also mends text before (ftfy: curly quotes, full-width letters, broken encodings; HTML entities): write
what you mean instead.
"""

import functools
import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from handheld.errors import HandheldError, missing_extra

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = Path(__file__).with_name("vocabulary") / "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49_152 - 256 - 2
"""Of the file's merges, those that CLIP was trained with."""
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
TOKENIZER_FILE, VOCABULARY_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
"""What apps read: the first by Hugging Face's libraries, the other two by most others."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Tokens:
    """A prompt's ids, (77,) int32, and the end of the prompt that found no room in them."""

    ids: npt.NDArray[np.int32]
    dropped: str = ""


class ClipTokenizer:
    """Gives a prompt's ids: start, what the prompt says, end, and ends until there are 77."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompt: str) -> Tokens:
        """Raises `HandheldError` for text that is no Unicode."""
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise HandheldError(f"the prompt is no valid Unicode: {error.reason} at place {error.start}.") from None
        found = self._tokenizer.encode(prompt, add_special_tokens=False)
        start, end = (self._tokenizer.token_to_id(token) for token in (START, END))
        room = LENGTH - 2
        ids = [start, *found.ids[:room], end]
        dropped = prompt[found.offsets[room][0] :].strip() if len(found.ids) > room else ""
        return Tokens(np.array(ids + [end] * (LENGTH - len(ids)), np.int32), dropped)

    def write(self, folder: Path) -> None:
        """The files that apps read, into an existing folder."""
        made = self._tokenizer.to_str()
        model = json.loads(made)["model"]
        merges = "\n".join(" ".join(merge) for merge in model["merges"])
        (folder / TOKENIZER_FILE).write_text(made, encoding="utf-8")
        (folder / VOCABULARY_FILE).write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / MERGES_FILE).write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


@functools.cache
def clip_tokenizer() -> ClipTokenizer:
    """CLIP's own. Raises `HandheldError` if `tokenizers` is not installed."""
    _require()
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
        merges = [(first, second) for first, second in map(str.split, file.read().split("\n")[1 : MERGES + 1])]
    letters = _letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges), START, END]
    tokenizer = Tokenizer(
        models.BPE({word: index for index, word in enumerate(words)}, merges, end_of_word_suffix="</w>", unk_token=END)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens([START, END])
    # For whoever reads the written file: `ClipTokenizer` places them itself, beside what it cuts off.
    ends = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(f"{START} $A {END}", special_tokens=ends)
    return ClipTokenizer(tokenizer)


def read_tokenizer(folder: Path) -> ClipTokenizer:
    """The one that `ClipTokenizer.write` wrote. Raises `HandheldError` if it is missing or damaged."""
    _require()
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise HandheldError(f"no file at {path}.")
    try:
        return ClipTokenizer(Tokenizer.from_file(str(path)))
    except Exception as error:  # it raises bare Exceptions
        raise HandheldError(f"{path} is no tokenizer: {error}.") from error


def _require() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise missing_extra("a prompt", "pipelines", "tokenizers") from error


def _letters() -> list[str]:
    """A printable letter for each byte, in the vocabulary's order: those that are printable as Latin-1 come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [*map(chr, printable), *(chr(256 + index) for index in range(others))]
