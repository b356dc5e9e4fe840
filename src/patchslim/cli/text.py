"""How commands describe methods, schedules and calibrations: as plain data and as lines of text.

This file runs no model and opens no file.
"""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from patchslim.calibration.calibrate import must_be_calibrated
from patchslim.methods import LearnedMethod
from patchslim.methods._method import Method, method_settings
from patchslim.methods._registry import method_kind, method_name
from patchslim.model.plan import Plan

# The groups in which methods are listed, and what those in them do.
METHOD_GROUPS = {
    "pruning": "keep some patches, and drop the others",
    "merging": "join patches that are alike",
    "hybrid": "keep some patches, and fuse the others or let them wait",
    "calibrated": "are fitted to unlabelled images first (patchslim calibrate)",
    "learned": "are trained first (patchslim train)",
    "other": "do none of this",
}


def method_facts(method: type[Method]) -> dict[str, Any]:
    """Collects what a user needs to know about a method before using it."""
    parameters = inspect.signature(method).parameters.values()
    needs = ["a class token or an attention-pooling head"] if method.needs_class_token else []
    made = method()
    if isinstance(made, LearnedMethod) and made.missing is not None:
        needs.append("to be trained or calibrated")
    return {
        "group": _method_group(made),
        "doc": (inspect.getdoc(method) or "").partition("\n")[0],
        "needs": needs,
        "place": method.place.value,
        "spread": method.placement.value,
        "settings": {parameter.name: parameter.default for parameter in parameters},
        "training": dict(method.training_defaults),
    }


def _method_group(method: Method) -> str:
    """Returns the group in which a method is listed."""
    if must_be_calibrated(method):
        return "calibrated"
    if isinstance(method, LearnedMethod) and method.missing is not None:
        return "learned"
    return method_kind(type(method))


def training_text(settings: Mapping[str, Any]) -> str:
    """Writes a method's own training defaults as the options of `patchslim train`."""
    return " ".join(
        f"--{name.replace('_', '-')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in settings.items()
    )


def model_facts(args: Namespace, plan: Plan) -> dict[str, Any]:
    """Collects the tokens and operations of a slimmed model, as plain data."""
    cost, dense = plan.cost, plan.dense_cost
    return {
        "model": args.model,
        "method": method_name(plan.method),
        "settings": method_settings(plan.method),
        "tail": plan.tail,
        "tokens": list(plan.counts),
        "gmacs": round(cost.total / 1e9, 3),
        "dense_gmacs": round(dense.total / 1e9, 3),
        "macs": cost.total,
        "dense_macs": dense.total,
        "share": cost.total / dense.total,
        "choosing_macs": cost.choosing,
    }


def facts_text(facts: Mapping[str, Any]) -> str:
    """Writes the facts of `model_facts` as lines of text."""
    settings = ", ".join(f"{name}={value}" for name, value in facts["settings"].items())
    method = facts["method"] + (f" ({settings})" if settings else "")
    share = f"{facts['share']:.1%}"
    if facts["choosing_macs"]:
        share += f"; choosing adds {facts['choosing_macs'] / facts['dense_macs']:.2%}"
    return "\n".join(
        [
            f"model          {facts['model']}",
            f"method         {method}, tail {facts['tail']}",
            f"tokens left    {' '.join(map(str, facts['tokens']))}   (after each block)",
            f"GMACs          {facts['gmacs']:.3f} of {facts['dense_gmacs']:.3f} ({share})",
        ]
    )


def _tolerance_text(record: Mapping[str, Any]) -> str:
    """Writes the tolerance as text; without one, the counts were given."""
    return "none" if record["tolerance"] is None else f"{record['tolerance']:.3g}"


def _errors_text(record: Mapping[str, Any]) -> str:
    """Writes the final error of each block that was searched, in the order of the blocks."""
    relative = record["search"]["error"] == "relative"
    layers = sorted(record["layers"], key=lambda layer: int(layer["block"]))
    return " ".join(
        f"{layer['error'] / (layer['scale'] if relative else 1.0):.2g}" for layer in layers
    )


def calibration_lines(record: Mapping[str, Any]) -> list[str]:
    """Writes the result of a calibration as lines of text."""
    if "threshold" in record:
        return _threshold_lines(record)
    return [
        f"errors         {_errors_text(record)}   (of the features after the next block)",
        f"tolerance      {_tolerance_text(record)}, on {record['images']} images",
        f"schedule       {json.dumps(record['schedule'])}",
    ]


def _threshold_lines(record: Mapping[str, Any]) -> list[str]:
    """Writes a threshold, and what images cost with it, as lines of text."""
    threshold = record["threshold"]
    name, value = threshold["setting"], threshold["value"]
    setting = "" if name is None else f"{name}={value:.4g}, "
    spent = _distribution_text(record["spent"], ".3f")
    return [
        f"threshold      {setting}on {record['images']} images",
        f"operations     {spent}; never above {record['cap']:.3f}",
        f"tokens         {_distribution_text(record['tokens'], '.0f')}   (entering the last block)",
        f"same answers   {record['agreement']:.1%}, KL {record['kl']:.2g} nats",
    ]


def _distribution_text(figures: Mapping[str, float], style: str) -> str:
    """Writes mean, median, 99th percentile and maximum, in one format style."""
    names = {"mean": "mean", "p50": "median", "p99": "p99", "max": "max"}
    return ", ".join(f"{label} {figures[name]:{style}}" for name, label in names.items())
