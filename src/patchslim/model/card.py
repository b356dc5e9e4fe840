"""What stands beside a saved model for people and for other libraries. `load` reads none of it."""

from __future__ import annotations

import json
from typing import Protocol

from torch import nn

from patchslim.errors import WrongInput
from patchslim.hosts._registry import find_libraries
from patchslim.model.plan import Plan
from patchslim.saving.folder import CARD_FILE, Recipe
from patchslim.schedules.schedule import Schedule
from patchslim.settings import show_value

# What the Hub reads at the top of a card. So its page says which library opens the model.
HEAD = """---
library_name: patchslim
tags:
- patchslim
- token-reduction
---
"""
NOT_MEASURED = """Not measured yet. `patchslim measure FOLDER --data IMAGES` measures this model
beside the dense one and beside random patches; `save(path, results=report)` writes a report here.
"""


class Results(Protocol):
    """What can stand in a card: a `Report`, as `measure` returns it."""

    def markdown(self) -> str:
        """Returns a table, and how it was measured."""


def write_texts(
    host: nn.Module, plan: Plan, recipe: Recipe, results: Results | None
) -> dict[str, str]:
    """Writes the files beside a saved model, by name: its card, and what each library looks for.

    Args:
        host: the dense model.
        plan: what is done to the host.
        recipe: the recipe of the model.
        results: what stands in the card; None says how to measure.
    """
    if results is not None and not callable(getattr(results, "markdown", None)):
        raise WrongInput(
            f"results={show_value(results)}: give the Report that `measure` returns, or leave it "
            "out."
        )
    pictures = len(plan.adapter.describe(host).image_shape) == 3  # no videos, no sound
    images = recipe["images"] if pictures and recipe["images"]["stated"] else None
    entries: dict[str, dict[str, object]] = {}
    for library in find_libraries():
        for name, entry in library.describe_saved(host, images).items():
            entries[name] = entries.get(name, {}) | entry
    files = {name: json.dumps(entry, indent=2) + "\n" for name, entry in entries.items()}
    return {CARD_FILE: _write_card(type(host).__name__, plan, recipe, results), **files}


def _write_card(host: str, plan: Plan, recipe: Recipe, results: Results | None) -> str:
    """Writes the card of a saved model, in Markdown."""
    method = recipe["method"] or recipe["method_class"]
    settings = ", ".join(f"{name}={value}" for name, value in recipe["settings"].items())
    images = recipe["images"]
    height, width = images["image_size"]
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    facts = {
        "method": f"`{method}`" + (f" ({settings})" if settings else ""),
        "schedule": f"{Schedule.from_json(recipe['schedule'])}, tail {recipe['tail']}",
        "tokens": f"{plan.shape.entering}; after each block {' '.join(map(str, plan.counts))}",
        "operations": f"{plan.cost} of {plan.dense_cost} an image "
        f"({plan.cost.total / plan.dense_cost.total:.1%})",
        "images": f"{height} x {width} pixels, mean {_numbers(images['mean'])}, "
        f"std {_numbers(images['std'])}, {images['interpolation']}, crop {images['crop_pct']:.3g}"
        + ("" if images["stated"] else " (assumed: the host did not say)"),
        "weights": "trained with fewer patches" if recipe["trained"] else "the host's own",
        "versions": f"patchslim {recipe['package']}, {versions}",
    }
    table = "\n".join(
        "| {} | {} |".format(name, fact.replace("|", r"\|")) for name, fact in facts.items()
    )
    measured = NOT_MEASURED if results is None else results.markdown().strip()
    return f"""{HEAD}
# {host} with fewer patches

A `{host}` that patchslim gave fewer patches: the same call, the same kind of answer, fewer
operations.

| | |
|---|---|
{table}

## Use

```python
import patchslim

model = patchslim.load("PATH OF THIS FOLDER")  # on the Hub: "hf-hub:owner/name"
```

No other library opens this folder. The loaded model is called as the host is.

## Results

{measured}
"""


def _numbers(values: list[float]) -> str:
    """Writes numbers as text."""
    return ", ".join(f"{value:.4g}" for value in values)
