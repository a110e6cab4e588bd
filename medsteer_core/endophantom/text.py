"""The text side of EndoPhantom: a word tokenizer and a small text encoder.

Prompts are sets of words. Word order is free because the encoder has no positions, and words outside the vocabulary
are dropped, so that "An endoscopic image of polyps", "polyps, endoscopic image" and "polyps!!" all mean polyps. What is
dropped, and says more than "of the", is named by `ignored`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

START = "<start>"
IGNORED = "medsteer_ignored_words"  # of a conditioning: the words of its prompt that were not known
VOCABULARY: tuple[str, ...] = (
    START, "endoscopic", "image", "polyps", "dyed", "lifted", "resection", "margins", "esophagitis", "normal",
    "cecum", "pylorus", "z-line", "ulcerative", "colitis",
)  # fmt: skip
ALIASES: dict[str, str] = {
    "polyp": "polyps", "polypoid": "polyps", "adenoma": "polyps", "dye": "dyed", "stained": "dyed", "lift": "lifted",
    "margin": "margins", "resected": "resection", "oesophagitis": "esophagitis", "healthy": "normal",
    "caecum": "cecum", "zline": "z-line", "endoscopy": "endoscopic", "colonoscopy": "endoscopic", "photo": "image",
    "picture": "image", "images": "image",
}  # fmt: skip
# Words without which a prompt says the same.
_FILLERS = frozenset("a an the of in at on and with for from by to is are this that it its".split())
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
_WORD = re.compile(r"z[\s-]+line|[^\W\d_]+(?:-[^\W\d_]+)*")


def word_ids(text: str) -> list[int]:
    """Vocabulary ids of the known words of ``text``, in their order; unknown words are dropped. No start token."""
    return [_INDEX[ALIASES.get(word, word)] for word in _words(text) if ALIASES.get(word, word) in _INDEX]


def ignored(text: str) -> list[str]:
    """The words of ``text`` that are not known and might have meant something, in their order, each once."""
    unknown = (word for word in _words(text) if ALIASES.get(word, word) not in _INDEX and word not in _FILLERS)
    return list(dict.fromkeys(unknown))


def nearest(word: str) -> str | None:
    """The known word that is most like an unknown one; None where none is."""
    found = difflib.get_close_matches(word, [*VOCABULARY[1:], *ALIASES], n=1, cutoff=0.7)
    return found[0] if found else None


def ignored_in_short(words: Iterable[str]) -> str:
    """Ignored words with their nearest known ones, for the little room on a prompt's node."""
    return "Ignored: " + ", ".join(f"{word} ({near}?)" if (near := nearest(word)) else word for word in words)


def about_ignored(words: Iterable[str]) -> str:
    """What there is to say of ignored words; "" of none."""
    told = [f"'{word}' (did you mean '{near}'?)" if (near := nearest(word)) else f"'{word}'" for word in words]
    if not told:
        return ""
    return f"EndoPhantom does not know {', '.join(told)} and ignores that. It knows: {', '.join(VOCABULARY[1:])}."


def _words(text: str) -> list[str]:
    """The words of ``text`` in lower case; one with hyphens that is not known as a whole is taken apart."""
    words = (re.sub(r"\s+", "-", w) for w in _WORD.findall(text.lower()))
    return [part for word in words for part in ([word] if ALIASES.get(word, word) in _INDEX else word.split("-"))]


def tokenize(text: str) -> list[int]:
    """Token ids of a prompt: the start token, then its known words. The empty prompt is the start token alone."""
    return [_INDEX[START], *word_ids(text)]


def pad(token_lists: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad token lists to one length. Returns ids ``(batch, tokens)`` and a mask ``(batch, tokens)``, True for real."""
    longest = max(len(tokens) for tokens in token_lists)
    ids = torch.zeros(len(token_lists), longest, dtype=torch.long)
    mask = torch.zeros(len(token_lists), longest, dtype=torch.bool)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return ids, mask


class TextEncoder(nn.Module):
    """Word embeddings and one self-attention layer without positions.

    ``forward(ids (batch, tokens), mask (batch, tokens) or None) -> (batch, tokens, width)``
    """

    def __init__(self, width: int = 128, heads: int = 4, vocabulary: int = len(VOCABULARY)):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        keys = None if mask is None else mask[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.norm_out(x)
