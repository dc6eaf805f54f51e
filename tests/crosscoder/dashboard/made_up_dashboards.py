"""Dashboards of made-up latents, of any size, with text that a careless page would run."""

from __future__ import annotations

import random

from crosscoder.dashboard.builder import COLUMNS, columns_of
from crosscoder.dashboard.records import Band, Dashboard, Example, Examples, LatentPage, Summary, TokenUse, Value

HOSTILE = (
    "<script>window.broken = 1</script>",
    "</script><script>window.broken = 2</script>",
    "<!-- <script>",
    "<img src=x onerror='window.broken = 3'>",
    "&lt;b&gt; \u2028 \u202e {{data}} ]]>",
    "\x00\ud800",
)
HOSTILE_LATENT = 7
KINDS = ("fine-tuned-only", "shared", "instruct-only", "between")
WORDS = 32_000


def made_up_dashboard(
    n_latents: int,
    n_with_examples: int,
    two_models: bool = True,
    n_examples: int = 10,
    n_delta: int = 0,
    measured: bool = False,
    matched: bool = False,
) -> Dashboard:
    """With `n_delta` a partition, whose last latents are delta latents. `measured`: with labels and causal effects,
    latent j's "names <j>, =or not" and 1 - j. `matched`: with partners in another dictionary, that of j is 100 + j with
    a cosine of 1 - j / 100, whose tokens are "its <j>".

    Latent j has frequency (j + 1) / 1e6 and largest activation j + 1; every tenth, from 9 on, is never active.

    Its strongest example has that activation at `peak`, half of it at the token after, and the token " Word<j>."
    in it. Latent HOSTILE_LATENT has the hostile texts for tokens.
    """
    dice = random.Random(0)
    pages = tuple(_page(j, j < n_with_examples, n_latents, two_models, n_examples, dice) for j in range(n_latents))
    if n_delta:
        for page in pages:
            page.values["part"] = "delta" if page.latent >= n_latents - n_delta else "shared"
    for page in pages if measured else ():
        label = f"names <{page.latent}>, =or not"
        page.values.update(label=label, label_score=0.5, causal_effect=1.0 - page.latent)
    for page in pages if matched else ():
        j = page.latent
        page.values.update(match=100 + j, match_cosine=1 - j / 100, match_kind=KINDS[j % 4], match_frequency=0.5)
        page.values["match_tokens"] = f"its <{j}>"
    vocabulary = {i: f" Word{i}." for i in range(WORDS)} | {WORDS + i: text for i, text in enumerate(HOSTILE)}
    columns = tuple(columns_of([page.values for page in pages]))
    return Dashboard(
        title="made-up </title><script>window.broken = 4</script>",
        summary=Summary(("It explains 12.3%.", HOSTILE[0]), (8, 0, HOSTILE_LATENT), "difference_share"),
        facts=(("data", HOSTILE[0]), ("tokens", "12,345 in 40 documents")),
        columns=columns,
        directions=("instruct", "fine-tuned") if two_models else ("difference",),
        chosen_by="that come first",
        pages=pages,
        vocabulary=vocabulary,
    )


def is_alive(latent: int) -> bool:
    return latent % 10 != 9


def _page(j: int, chosen: bool, n_latents: int, two_models: bool, n_examples: int, dice: random.Random) -> LatentPage:
    alive = is_alive(j)
    tokens = (
        tuple(range(WORDS, WORDS + len(HOSTILE))) if j == HOSTILE_LATENT else tuple(dice.choices(range(WORDS), k=5))
    )
    return LatentPage(
        latent=j,
        values=_values(j, alive, two_models, n_latents),
        max_activation=j + 1.0 if alive else 0.0,
        top_tokens=tokens if alive else (),
        promoted=tuple(tuple(dice.sample(range(WORDS), 10)) for _ in range(2 if two_models else 1)),
        nearest=tuple(((j + step) % n_latents, round(dice.uniform(0, 1), 4)) for step in range(1, 9)),
        histogram=tuple(dice.randrange(5000) for _ in range(30)) if alive else (0,) * 30,
        context=f"a context of «{j}»: {HOSTILE[0]}" if alive else "",
        examples=_examples(j, tokens, n_examples, dice) if chosen and alive else None,
    )


def _values(j: int, alive: bool, two_models: bool, n_latents: int) -> dict[str, Value]:
    values: dict[str, Value] = dict.fromkeys(column.key for column in COLUMNS)
    values |= {
        "kind": KINDS[j % 4] if two_models else None,
        "frequency": (j + 1) / 1e6 if alive else 0.0,
        "completion_share": (j % 100) / 100,
        "template_share": (j % 5) / 4,
        "difference_share": (j + 1) / n_latents**2 if alive else 0.0,
        "mean_activation": (j + 1) / 3 if alive else 0.0,
        "max_activation": j + 1.0 if alive else 0.0,
    }
    if two_models:
        share = (j + 0.123456789) / n_latents
        norms = {"instruct_norm": 1 - share, "fine_tuned_norm": share, "relative_decoder_norm": share, "delta": share}
        norms["norm_distance"] = abs(share - 0.5)
        nu = None if j == 3 else round(2 * share, 6)
        scaling = {"nu_err": nu, "nu_rec": share, "exclusivity": None if nu is None else 1 - nu, "scaling_firings": j}
        said = {"fine_tuned_verdict": "confirmed" if j % 4 == 0 else "unreliable", "instruct_verdict": "unreliable"}
        values |= {**norms, **scaling, **said, "cosine": 1 - 2 * share}
        values["confirmed"] = "fine-tuned-only" if j % 4 == 0 else ""
    return values


def _examples(j: int, top: tuple[int, ...], n: int, dice: random.Random) -> Examples:
    first = 0
    made = []
    for i in range(n + 16):
        # Some overlap with the one before and some do not.
        first += dice.randrange(1, 80)
        # As hard to compress as text can be.
        text = tuple(((first + 1000 * j + k) * 2_654_435_761 >> 7) % WORDS for k in range(36))
        if j == HOSTILE_LATENT and i == 0:
            text = (*top, *text[len(top) :])
        if i == 0:
            text = (*text[:30], j, *text[31:])
        levels = [0] * 36
        levels[24], levels[25] = 255 - 3 * i, 127
        # Documents of their own for every latent and example: no stretch is shared, the worst case for size.
        made.append(Example(f"made-up/{j}/{i}", 100_000 * j + 1000 * i, text, tuple(levels), 24))
    strongest, others = made[:n], made[n:]
    bands = tuple(
        Band(q, q + 0.25, q * (j + 1), (q + 0.25) * (j + 1), tuple(others[4 * i : 4 * i + 4]))
        for i, q in enumerate((0.75, 0.5, 0.25, 0.0))
    )
    uses = tuple(TokenUse(token, 10 + j, 0.5, 0.25 * (j + 1)) for token in top)
    return Examples(tuple(strongest), bands, uses)
