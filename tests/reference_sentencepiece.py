"""SentencePiece's BPE in plain Python, from a GGUF's three arrays: an oracle for tokenizers.

Source: google/sentencepiece, `src/bpe_model.cc` (Encode) and `normalizer.cc` (PrefixMatcher):
user-defined symbols go first, the longest at each place; then the adjacent pair whose piece scores
best is merged, the left one of two equals; what is no piece at the end is bytes. Differs: as in
llama.cpp, control tokens are found in text like user-defined ones, and both before a space becomes
`▁`, so that two of these in a text are not two spaces; nothing else is normalized.
"""

from __future__ import annotations

from itertools import pairwise

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


class SentencePiece:
    def __init__(self, tokens: list[str], scores: list[float], types: list[int]) -> None:
        self.ids = {token.replace(" ", "▁"): id for id, token in enumerate(tokens)}
        named = {kind: set[str]() for kind in range(8)}
        for token, kind in zip(tokens, types, strict=True):
            named[kind].add(token)
        self.whole = named[CONTROL] | named[USER_DEFINED]
        self.longest = max(map(len, self.whole), default=0)
        self.scores = {
            token.replace(" ", "▁"): score
            for token, score, kind in zip(tokens, scores, types, strict=True)
            if kind == NORMAL
        }

    def encode(self, text: str) -> list[int]:
        at, ids, run = 0, list[int](), list[str]()
        while at < len(text):
            sizes = range(min(self.longest, len(text) - at), 0, -1)
            size = next((n for n in sizes if text[at : at + n] in self.whole), 0)
            if size:
                token = text[at : at + size].replace(" ", "▁")
                ids += [*self._merged(run), self.ids[token]]
                run = []
            else:
                run.append(text[at].replace(" ", "▁"))
            at += size or 1
        return ids + self._merged(run)

    def _merged(self, pieces: list[str]) -> list[int]:
        pieces, nothing = list(pieces), float("-inf")
        while len(pieces) > 1:
            pairs = map("".join, pairwise(pieces))
            scores = [self.scores.get(pair, nothing) for pair in pairs]
            best = max(scores)
            if best == nothing:
                break
            at = scores.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [id for piece in pieces for id in self._ids(piece)]

    def _ids(self, piece: str) -> list[int]:
        if piece in self.ids:
            return [self.ids[piece]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
