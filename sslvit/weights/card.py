"""The model card, README.md of a model folder, in the Hugging Face Hub's form."""

from collections.abc import Sequence

from sslvit.runs.public import markdown
from sslvit.weights.timm_config import TIMM_OPENS

BY_TIMM = """
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)  # standardise first

from transformers import AutoModel  # with timm installed

model = AutoModel.from_pretrained("FOLDER")
"""
CARD = """---
library_name: {library}
tags: [sslvit, vision-transformer, image-feature-extraction]
---
# {name}

{about}- The readout to use is {readout}. In sslvit images are in [0, 1].

{tables}How to load it:

```python
from sslvit.weights.hub import load_model

vit = load_model("FOLDER_OR_OWNER/NAME")  # cls, patches = vit(images)
{by_timm}```
"""


def card(name: str, about: Sequence[str], readout: str, architecture: str, tables: Sequence[str] = ()) -> str:
    """about: sentences about the model. A run's report replaces the first card by a longer one."""
    by_timm = architecture in TIMM_OPENS
    return CARD.format(
        library="timm" if by_timm else "sslvit",
        name=markdown(name),
        about="".join(f"- {markdown(sentence)}\n" for sentence in about),
        readout=readout,
        tables="".join(f"{line}\n" for line in tables),
        by_timm=BY_TIMM if by_timm else "",
    )
