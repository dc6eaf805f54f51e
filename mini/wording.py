"""How FinQA-mini's questions are worded, as the study needs it to find where a question says what it asks for."""

from __future__ import annotations

from mini.families import FAMILIES
from mini.pages import REGIONS
from study.measures.wording import Wording


def finqa_mini_wording() -> Wording:
    """Of all families, those that FinQA-mini leaves to another fine-tune included."""
    return Wording(
        phrasings={family.name: family.phrasings for family in FAMILIES},
        templates={family.name: family.shape for family in FAMILIES},
        kinds={family.name: family.kind for family in FAMILIES},
        fillers={"region": REGIONS, "count": tuple("23456")},
    )
