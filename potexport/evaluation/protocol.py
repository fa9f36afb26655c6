"""How it was measured, in sentences that stand beside the figures."""

from __future__ import annotations

from potexport.evaluation.loop import Loop
from potexport.evaluation.needles import KINDS
from potexport.evaluation.settings import Settings

OF_TASK = {
    "needle": (
        f"{len(KINDS)} needles of different kinds a document, numbers of five digits in prose, "
        "each asked by itself in the model's chat template; the answer is begun for the model and "
        "scored under teacher forcing: exact if every token of the number is the likeliest one"
    ),
    "hit-rate": (
        "the share of the tokens that the untouched model attends to most while it reads the "
        "question, as many a head as are kept, that the pot still holds; the mean of all heads"
    ),
    "perplexity": (
        "of prose, without a chat or a question, over the tokens that come after the pot was full "
        "for the first time; truncation reads its last tokens again whenever the pot is full"
    ),
    "qa": "token F1, as LongBench normalises it; answers are greedy",
    "summary": "ROUGE-L by the package rouge-score; answers are greedy",
}


def protocol(tasks: tuple[str, ...], loop: Loop, settings: Settings) -> dict[str, str]:
    """By subject."""
    pot, keep = loop.session.manifest.pot, loop.keep
    found = {task: OF_TASK[task] for task in tasks}
    found["equal_memory"] = (
        f"after a document, before its question, every policy compresses to exactly {keep} slots, "
        f"unless the document never filled the pot of {pot.slots}"
    )
    found["question"] = (
        "known: the question scores the pot while the document is read, anew for each question; "
        "unknown: read once, then asked each question; rows that cannot differ are measured once"
    )
    found["full"] = "the same model untouched, in PyTorch in fp32, with its whole cache"
    found["truncation"] = (
        "the chat's head and as many of the last tokens as the whole pot holds beside a question "
        "and its answer; nothing is compressed"
    )
    if "needle" in tasks:
        found["oracle"] = (
            "a reader that knew: the chat's head, the sentences with the needles, and the latest "
            f"prose, together {keep} tokens or what the pot holds beside a question and its "
            "answer, read by the same graphs without a compression"
        )
    found["interval"] = (
        f"95%, bootstrap over documents and not over questions, seed {settings.seed}"
    )
    return found
