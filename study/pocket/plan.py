"""What the study trains and measures, and the time it takes.

By parts that were measured on two quiet cores, torch 2.13, one thread each: a fine-tune of 5,000 questions takes 6
minutes, an evaluation of 1,100 questions 3, an activation set with its next tokens 1.5, a dictionary 30 s, the known
answer of one subject 10 s. Everything but ceilings runs two at a time.

Dictionaries take 1,000 steps in place of the library's default, all methods alike. What that costs, the plain
crosscoder on the demo's set (MLP output of layer 3, 800 documents, seed 0), explained variance on held-out documents:

    steps          passes   both models   difference   L0     processor time
    2,123          3        0.966         0.629        24.8   52 s, two threads, recorded by the demo
    1,000          1.4      0.956         0.559        24.8   37 s, one thread of a busy machine
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finqa.training.rows import Families

MINUTES = {"study": 90, "study-quick": 3}
"""What a study takes where nothing is there yet, estimated from its parts."""
DATASET, STUDENT = "FinQA-mini", "pocket-mistral"

SHOWN_STRATUM = "program before the operator"
"""The one of the two primary strata that the page, the figure and the progress lines show; the CSVs have both."""
SHIPPED_KINDS = "known,new"
"""The kinds of family in FinQA-mini as it is shipped."""

Method = Literal["plain", "difference term", "partition", "L1", "difference SAE"]
METHODS: dict[Method, tuple[Any, dict[str, Any]]] = {
    "plain": ("batchtopk", {}),
    "difference term": ("batchtopk", {"difference_weight": "equal"}),
    "partition": ("partition", {}),
    "L1": ("l1", {}),
    "difference SAE": ("difference-sae", {}),
}
"""Methods by name: the library's method, and its settings beside those that all share."""
Form = Literal["trained", "untrained", "frozen decoder"]
"""`untrained`: as training starts, with the threshold that the data give. `frozen decoder`: only the encoder, its
threshold and the biases are trained."""
TRAINED_AND_UNTRAINED: tuple[Form, ...] = ("trained", "untrained")
ALL_FORMS: tuple[Form, ...] = ("trained", "untrained", "frozen decoder")
WITHOUT_DIFFERENCE: tuple[Method, ...] = ("plain", "L1")
"""Methods that can be trained on two identical models; the others use their difference, and there is none."""


@dataclass(frozen=True)
class Model:
    """A fine-tune of the student, or the student itself."""

    name: str
    added: tuple[str, ...] = ()
    """Kinds of family that it learnt and its base does not know."""
    run_name: str | None = None
    """Run name for main.py; None is the base."""
    seed: int = 3
    families: Families = "all"
    kinds: str = SHIPPED_KINDS
    """Kinds of the rows that it is trained on."""


BASE = Model("base")
FINE_TUNED = Model("fine-tuned", ("new",), "")
SECOND_SEED = Model("fine-tuned, second seed", ("new",), "seed-4", seed=4)
THIRD_SEED = Model("fine-tuned, third seed", ("new",), "seed-5", seed=5)
FINE_TUNES = (FINE_TUNED, SECOND_SEED, THIRD_SEED)
"""One fine-tune under several seeds: figures are means over these, with their intervals."""
SHAM = Model("sham", (), "sham", kinds="known")
"""Learns from questions of its own, as many distinct ones as the fine-tune has, each seen as often."""
OTHER = Model("other families", ("other",), "other-families", kinds="known,other")


@dataclass(frozen=True)
class Pair:
    """Two models that are compared."""

    instruct: Model
    fine_tuned: Model
    methods: tuple[Method, ...] = tuple(METHODS)
    seed: int = 0
    """Seed of the dictionaries."""
    forms: tuple[Form, ...] = TRAINED_AND_UNTRAINED
    published_site: bool = False
    """Whether it is read at the published site too, where another one is chosen."""
    causal: bool = False
    """Whether latents are put into the models, which takes minutes."""

    @property
    def name(self) -> str:
        return f"{self.instruct.name} -> {self.fine_tuned.name}"

    @property
    def compared(self) -> str:
        """What is compared, whichever seed of fine-tuning the second model has: such pairs are means of one row."""
        repeats = self.instruct == BASE and self.fine_tuned in FINE_TUNES
        return f"{BASE.name} -> {FINE_TUNED.name}" if repeats else self.name

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace(" -> ", "-to-").replace(",", "").replace(" ", "-")

    @property
    def identical(self) -> bool:
        return self.instruct == self.fine_tuned

    @property
    def added(self) -> tuple[str, ...]:
        """Kinds of family that the second model has learnt and the first has not."""
        return tuple(kind for kind in self.fine_tuned.added if kind not in self.instruct.added)


@dataclass(frozen=True)
class Plan:
    """One length of the study."""

    name: str
    pairs: tuple[Pair, ...]
    test_questions: int
    """Questions from the top of FinQA-mini's test split."""
    other_questions: int
    """Questions of the families that FinQA-mini lacks and one of the fine-tunes learns."""
    pair_pages: int
    """Pages of minimal pairs, a multiple of three: each page is asked every family of one template."""
    ceiling_questions: int
    """Questions of added families, on which ceilings are measured."""
    causal_questions: int
    reply_questions: int
    """Questions of added families to which patched models write replies."""
    random_sets: int
    """Controls of the causal figures."""
    permutations: int
    """Number of permutations of the null distribution."""
    steps: int
    """Updates of a dictionary."""
    max_rows: int | None = None
    """Rows a fine-tune learns from; None is all of them."""

    @property
    def documents(self) -> int:
        """Test questions, all of which every activation set has; the three templates have 7, 5 and 3 families."""
        return self.test_questions + self.other_questions + 5 * self.pair_pages

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model of the pairs, each once."""
        return tuple(dict.fromkeys(m for pair in self.pairs for m in (pair.instruct, pair.fine_tuned)))

    def kinds_of_rows(self) -> tuple[str, ...]:
        """The kinds of training rows that are needed, each once."""
        return tuple(dict.fromkeys(model.kinds for model in self.models if model.run_name is not None))


FULL = Plan(
    name="study",
    pairs=(
        Pair(BASE, FINE_TUNED, forms=ALL_FORMS, published_site=True, causal=True),
        Pair(BASE, SECOND_SEED, seed=1, forms=ALL_FORMS, causal=True),
        Pair(BASE, THIRD_SEED, seed=2, forms=ALL_FORMS, causal=True),
        Pair(SHAM, FINE_TUNED),
        Pair(BASE, SHAM),
        Pair(BASE, OTHER),
        Pair(FINE_TUNED, SECOND_SEED),
        Pair(FINE_TUNED, FINE_TUNED, WITHOUT_DIFFERENCE),
    ),
    test_questions=500,
    other_questions=100,
    pair_pages=120,
    ceiling_questions=100,
    causal_questions=120,
    reply_questions=48,
    random_sets=10,
    permutations=200,
    steps=1000,
)
QUICK = Plan(
    name="study-quick",
    pairs=(
        Pair(BASE, FINE_TUNED, ("plain", "difference SAE"), forms=ALL_FORMS, published_site=True, causal=True),
        Pair(SHAM, FINE_TUNED, ("difference SAE",)),
        Pair(FINE_TUNED, FINE_TUNED, ("plain",)),
    ),
    test_questions=24,
    other_questions=6,
    pair_pages=6,
    ceiling_questions=3,
    causal_questions=8,
    reply_questions=1,
    random_sets=2,
    permutations=20,
    steps=30,
    max_rows=48,
)


def expected(plan: Plan) -> str:
    """The first line of a study: what is made, and how long it takes where nothing is there yet."""
    trainings = sum((1 + pair.published_site) * len(pair.methods) * len(pair.forms) for pair in plan.pairs)
    n_models, minutes = len(plan.models) - 1, MINUTES[plan.name]
    return (
        f"{plan.name}: {n_models} fine-tunes, {len(plan.pairs)} pairs, up to {trainings} dictionaries; about {minutes} "
        "minutes on two quiet cores where nothing is there yet"
    )
