"""Fills the generated tables in README and docs from the rows in benchmarks/results.

    python benchmarks/tables.py            # rewrites them
    python benchmarks/tables.py --check    # fails if one is out of date

A table stands between `<!-- table:NAME -->` and `<!-- end -->`. No figure is written by hand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage_tables
from peer_figures import PEERS

from patchslim.report.report import Report
from patchslim.report.row import Estimate, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIDE_BY_SIDE = ("similarity (default: ward)", "similarity, threshold", "tome", "evit", "topk")
FRONT_BUDGETS = ("0.75", "0.65", "0.5")
FRONT_METHODS = {
    "similarity (default: ward)": "`similarity`",
    "tome": "`tome`",
    "evit": "`evit`",
    "topk": "`topk`",
    "random": "patches dropped at random",
}
FRONT_SPEED = ("similarity macs=0.6", "tome macs=0.6", "evit macs=0.6")
MARK = re.compile(r"<!-- table:([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def accuracy_table(rows: list[Row]) -> str:
    """Writes KL, agreement and accuracy beside the operations, random averaged over its seeds."""
    lines = [
        "| setting | tokens left | GMACs | KL to dense (nats) | agreement % | top-1 % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        kl = "0" if row.kl is None or row.method == "dense" else row.kl.show()
        agreement = "-" if row.agreement is None else f"{100 * row.agreement.value:.1f}"
        top1 = "-" if row.accuracy is None else f"{100 * row.accuracy.value:.1f}"
        lines.append(
            f"| {row.name} | {row.tokens[-1]} | {row.macs / 1e9:.3f} "
            f"| {kl} | {agreement} | {top1} |"
        )
    return "\n".join(lines)


def averaged(rows: tuple[Row, ...]) -> list[str]:
    """Writes lines for `random`, one a rate: mean over seeds, with the range of the seeds."""
    lines = []
    names = sorted(
        {row.name.split(" seed")[0] for row in rows if " seed" in row.name}, reverse=True
    )
    for name in names:
        same = [row for row in rows if row.name.startswith(f"{name} seed")]
        kls = [row.kl.value for row in same if row.kl]
        agree = statistics.mean(row.agreement.value for row in same if row.agreement)
        top1 = statistics.mean(row.accuracy.value for row in same if row.accuracy)
        lines.append(
            f"| {name} (mean of {len(same)} seeds) | {same[0].tokens[-1]} "
            f"| {same[0].macs / 1e9:.3f} "
            f"| {statistics.mean(kls):.2g} ({min(kls):.2g} to {max(kls):.2g}) | {100 * agree:.1f} "
            f"| {100 * top1:.1f} |"
        )
    return lines


def deit_tiny(keep: Callable[[Row], bool]) -> str:
    """Writes the rows of the DeiT-Ti table that `keep` selects, random last, with provenance."""
    report = Report.load(RESULTS / "deit_tiny.json")
    rows = [row for row in report.rows if " seed" not in row.name and keep(row)]
    lines = [accuracy_table(rows), *averaged(report.rows)]
    return "\n".join([*lines, "", f"<sub>{provenance_line(report)}</sub>"])


def peers(method: str) -> str:
    """Writes a method's settings beside what the official code reached with them."""
    reports = {name: Report.from_json(data) for name, data in _read("peers.json").items()}
    lines = [
        "| setting | tokens left | GMACs | KL | theirs | agree % | theirs | top-1 | theirs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for peer in PEERS:
        if peer.name not in reports or not peer.name.startswith(f"{method} "):
            continue
        row = reports[peer.name].rows[1]
        kl = "-" if row.kl is None else row.kl.show()
        lines.append(
            f"| {row.name} | {row.tokens[-1]} | {row.macs / 1e9:.3f} | {kl} "
            f"| {peer.kl:.2g} | {_percent(row.agreement)} | {peer.agree:.1f} "
            f"| {_percent(row.accuracy)} | {peer.top1:.1f} |"
        )
    origins = [report for name, report in reports.items() if name.startswith(f"{method} ")]
    if not origins:
        return "Not measured yet; `python benchmarks/peers.py --shared ../shared` does it."
    return "\n".join([*lines, "", f"<sub>{provenance_line(origins[0])}</sub>"])


def provenance_line(report: Report) -> str:
    """Says where, when and how a report was measured, in one line."""
    origin = report.provenance
    versions = ", ".join(f"{name} {version}" for name, version in origin.versions.items())
    return (
        f"{origin.images} images, {origin.processor}, {origin.threads} threads, {origin.dtype}, "
        f"{versions}, commit {origin.commit}, {origin.date[:10]}: `{origin.command}`"
    )


def speed() -> str:
    """Writes measured speed-up beside the ratio of operations."""
    reports = [Report.from_json(data) for data in _read("speed_cpu.json")]
    lines = [
        "| DeiT-S, eager | batch | MACs | fewer | measured speed-up [quartiles] | conversion |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for report in reports:
        for row in report.rows[1:]:
            if row.speedup is None or row.conversion is None:
                continue
            ratio = row.speedup
            lines.append(
                f"| {row.name} | {report.provenance.batch} | {row.macs / 1e9:.3f} G | "
                f"{1 / row.macs_share:.2f}x | {ratio.median:.2f}x "
                f"[{ratio.low:.2f}, {ratio.high:.2f}] | {row.conversion:.2f} |"
            )
    return "\n".join([*lines, "", f"<sub>{provenance_line(reports[0])}</sub>"])


LONGER = (
    "trained_longer",
    "trained_tome",
    "trained_tome_wise75",
    "trained_tome_wise50",
    "trained_evit",
    "trained_evit_wise75",
)


def trained(
    *names: str, of: str = "DeiT-Ti, 0.65 MACs", keep: Callable[[Row], bool] = lambda _: True
) -> str:
    """Writes each method untrained and trained, beside random at the same place and counts."""
    lines = [
        f"| {of} | images | KL (nats) | of untrained | agree % | top-1 % | Δ 95 % |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    facts = []
    for data in map(_read, (f"{name}.json" for name in names)):
        report = Report.from_json(data["report"])
        facts.append(f"<sub>{provenance_line(report)}</sub>")
        by_name = {row.name: row for row in report.rows}
        for row in filter(keep, report.rows):
            line = _trained_row(row, by_name, data["courses"])
            if line not in lines:  # untrained models are in every report
                lines.append(line)
    return "\n".join([*lines, "", "<br>\n".join(facts)])


LEARNED = ("spvit", "dtem", "patchmerger", "tokenlearner", "sinkhorn", "sit")


def learned(*methods: str) -> str:
    """Writes learned methods beside fine-tuned ones; all, or those that are named and random."""
    return trained(
        "learned",
        of="the example, 0.4 MACs",
        keep=lambda row: not methods or bool({"dense", *methods} & {*re.split(r"[ /]", row.name)}),
    )


def _trained_row(row: Row, by_name: dict[str, Row], runs: dict[str, Any]) -> str:
    """Writes one line, with the run that trained the model."""
    method = row.name.removesuffix(" trained")
    run = runs.get(method) if row.name != method else None
    seen, ratio, before = "-", "-", by_name.get(method)
    if run:
        seen = f"{run['steps'] * run['course']['batch']:,}"
        share = run["course"].get("wise", 1.0)
        seen += "" if share == 1 else f", wise={share:g}"
        if before and before.kl and row.kl:
            ratio = f"{row.kl.value / before.kl.value:.2f}"
    kl = "0" if row.method == "dense" or row.kl is None else row.kl.show()
    return (
        f"| {row.name} | {seen} | {kl} | {ratio} | {_percent(row.agreement)} "
        f"| {_percent(row.accuracy)} | {_interval(row.change)} |"
    )


def slimming() -> str:
    """Writes every method at every budget: KL, and the change of top-1 with its 95 % interval."""
    data = dict(sorted(_read("patch_slimming.json").items(), reverse=True))
    reports = {budget: Report.from_json(each["report"]) for budget, each in data.items()}
    trained = {budget: round(each["epochs"] * each["images"]) for budget, each in data.items()}
    rows = {
        budget: {row.name: row for row in report.rows if _is_shown(row.name)}
        for budget, report in reports.items()
    }
    names = list(dict.fromkeys(name for each in reversed(rows.values()) for name in each))
    heads = [f"{budget} MACs ({trained[budget] // 1000}k images)" for budget in data]
    lines = [f"| DeiT-Ti | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in names:
        cells = [_outcome(rows[budget].get(name)) for budget in data]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    facts = [f"<sub>{provenance_line(report)}</sub>" for report in reports.values()]
    return "\n".join([*lines, "", "<br>\n".join(facts)])


def _is_shown(name: str) -> bool:
    """Tells whether a row is a method, or random at the counts of the static or untrained ones."""
    return name != "dense" and (
        not name.startswith("random/") or name == "random/patch_slimming free"
    )


def _outcome(row: Row | None) -> str:
    """Writes KL in nats, and top-1 less the dense model's."""
    if row is None or row.kl is None:
        return "-"
    return f"{row.kl.value:.3f} ({_interval(row.change)})"


def choices() -> str:
    """Writes what the settings of Patch Slimming are worth without training."""
    data = _read("slimming_choices.json")
    lines = [
        "| calibration at 0.55 MACs, untrained | KL (nats) | agree % | KL in the worst tenth |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row['name']} | {row['kl']:.3f} ±{row['kl_error']:.3f} "
        f"| {100 * row['agreement']:.1f} | {100 * row['worst_share']:.0f} % |"
        for row in data["rows"]
    ]
    origin = data["birth"]
    facts = (
        f"{origin['images']} images, {origin['processor']}, {origin['threads']} threads, torch "
        f"{origin['versions']['torch']}, commit {origin['commit']}, {origin['date'][:10]}: "
        f"`{origin['command']}`"
    )
    return "\n".join([*lines, "", f"<sub>{facts}</sub>"])


def train_speed() -> str:
    """Writes seconds of a training step beside the dense model's."""
    data = _read("train_speed_cpu.json")
    origin = data["birth"]
    lines = [
        "| a training step | MACs | seconds | measured speed-up [quartiles] | conversion |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in data["rows"]:
        ratio, seconds = row["speedup"], row["seconds"]
        lines.append(
            f"| {row['name']} | {row['macs_share']:.2f} | {seconds['median']:.2f} | "
            f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] | "
            f"{row['conversion']:.2f} |"
        )
    facts = (
        f"{data['model']}, batch {origin['batch']}, {data['precision']}, {data['repeats']} rounds "
        f"interleaved, {origin['processor']}, {origin['threads']} threads, torch "
        f"{origin['versions']['torch']}, commit {origin['commit']}, {origin['date'][:10]}: "
        f"`{origin['command']}`"
    )
    return "\n".join([*lines, "", f"<sub>{facts}</sub>"])


def documents() -> str:
    """Writes what merging equal patches saves on pages and screens, and how the answer changes."""
    data = _read("documents.json")
    lines = [
        "| px | setting | patches left | MACs | speed-up (batch) | logits | KL | top-1 | bare |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in data["rows"]:
        left, ratio, got = row["left"], row["speedup"], row["positions"]
        choosing = f" + {row['choosing_share']:.2f}" if row["choosing_share"] > 0.005 else ""
        span = f" ({min(left)} to {max(left)})" if min(left) < max(left) else ""
        lines.append(
            f"| {row['size']} | {row['name']} | {statistics.mean(left):.0f}{span} "
            f"| {row['macs_share']:.2f}{choosing} "
            f"| {ratio['alone']['median']:.2f}x ({ratio['batch']['median']:.2f}x) "
            f"| {got['largest_difference']:.2f} of {got['largest_logit']:.1f} | {got['kl']:.2g} "
            f"| {got['same_top1']} of {len(left)} "
            f"| {row['no_positions']['largest_difference']:.1g} |"
        )
    origin = data["births"][0]
    facts = (
        f"{origin['images']} images, {data['repeats']} rounds interleaved, {origin['processor']}, "
        f"threads: {origin['threads']}, {origin['dtype']}, torch {origin['versions']['torch']}, "
        f"timm {origin['versions']['timm']}, commit {origin['commit']}, {origin['date'][:10]}: "
        f"`{origin['command']}`"
    )
    return "\n".join([*lines, "", f"<sub>{facts}</sub>"])


def similarity(wanted: Callable[[str], bool], name: str = "similarity.json") -> str:
    """Writes KL from dense and agreement with it at each budget; thresholds with their cost."""
    budgets = {name: Report.from_json(each) for name, each in _read(name).items()}
    first = next(iter(budgets.values()))
    names = [row.name for row in first.rows if wanted(row.name) and "seed" not in row.name]
    lines = [
        f"| KL (nats) / same answers % | {' | '.join(f'{name} MACs' for name in budgets)} |",
        "|---|" + "---|" * len(budgets),
    ]
    cells = {name: [_at(each, name) for each in budgets.values()] for name in names}
    lines += [f"| {name} | {' | '.join(every)} |" for name, every in cells.items()]
    if wanted("random"):
        lots = [_of_seeds(each) for each in budgets.values()]
        lines.append(f"| random (mean of its seeds) | {' | '.join(lots)} |")
    facts = "; ".join(f"{label} {value}" for label, value in first.provenance.lines())
    return "\n".join([*lines, "", f"<sub>{facts}</sub>"])


def front() -> str:
    """Writes README's one table: how many answers of the dense model stay, at three budgets."""
    reports = {share: Report.from_json(_read("similarity.json")[share]) for share in FRONT_BUDGETS}
    budgets = " | ".join(f"{100 * float(share):.0f} % of the operations" for share in reports)
    lines = [f"| same answers, % | {budgets} |", "|---|" + "--:|" * len(reports)]
    for name, method in FRONT_METHODS.items():
        cells = [_agreement(report, name) for report in reports.values()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"<sub>{provenance_line(next(iter(reports.values())))}</sub>"])


def families() -> str:
    """Lists the families of models that are served, from the first sentence of each one's page."""
    lines = ["| family | models |", "|---|---|"]
    for page in sorted((ROOT / "docs" / "families").glob("*.md")):
        title, paragraph = page.read_text(encoding="utf-8").split("\n\n")[:2]
        models = re.split(r"[.:](?:\s|$)", " ".join(paragraph.split()))[0]
        models = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", models)
        lines.append(f"| [{title.removeprefix('# ')}](families/{page.name}) | {models} |")
    return "\n".join(lines)


def family_laws() -> str:
    """Writes how exact each family is, and where that comes from."""
    rows = _read("families.json")
    facts = dict.fromkeys(_origin_line(row["birth"]) for row in rows.values())
    return f"{coverage_tables.laws(rows)}\n\n<sub>{'<br>'.join(facts)}</sub>"


def front_speed() -> str:
    """Says in a sentence what a budget of 0.6 gained in time, for every method timed there."""
    parts = []
    for report in (Report.from_json(data) for data in _read("speed_cpu.json")):
        wanted = [row for row in report.rows if row.name in FRONT_SPEED]
        faster = ", ".join(
            f"{row.speedup.median:.2f} (`{row.method}`)" for row in wanted if row.speedup
        )
        parts.append(f"at batch {report.provenance.batch} {faster}")
    return f"Measured speed-ups of DeiT-S at 60 % of its operations: {'; '.join(parts)}."


def _agreement(report: Report, name: str) -> str:
    """Computes the share of answers that stay, averaged if there are several seeds."""
    rows = [row for row in report.rows if row.name == name or row.name.startswith(f"{name}, seed")]
    return f"{100 * statistics.mean(row.agreement.value for row in rows if row.agreement):.1f}"


def _at(report: Report, name: str) -> str:
    """Writes one model at one budget; if images keep different numbers, what they cost."""
    rows = [row for row in report.rows if row.name == name]
    if not rows or rows[0].kl is None or rows[0].agreement is None:
        return "-"
    row, kl = rows[0], rows[0].kl
    cost = "" if row.spent is None else f" at {row.spent.mean:.3f} (max {row.spent.most:.2f})"
    return f"{kl.value:.2g} / {_percent(row.agreement)}{cost}"


def _of_seeds(report: Report) -> str:
    """Averages all seeds of `random`."""
    lots = [row for row in report.rows if row.method == "random" and row.kl and row.agreement]
    kl = statistics.mean(row.kl.value for row in lots if row.kl)
    agreement = statistics.mean(row.agreement.value for row in lots if row.agreement)
    return f"{kl:.2g} / {100 * agreement:.1f}"


def per_image_speed() -> str:
    """Writes what different numbers for each image gain: packed, padded, and fixed at that cost."""
    data = _read("ragged_cpu.json")
    lines = [
        "| host | batch | form | MACs, mean | measured speed-up [quartiles] | conversion |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for row in data["rows"]:
        ratio = row["speedup"]
        lines.append(
            f"| {row['host']} | {row['batch']} | {row['name']} | {row['share']:.3f} | "
            f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] | "
            f"{row['conversion']:.2f} |"
        )
    answers = "; ".join(
        f"{row['name']} {row['kl']:.2g} at {row['share']:.3f}" for row in data["answers"]
    )
    lines += ["", f"KL (nats) of these thresholds on DeiT-Ti, all 500 images: {answers}."]
    facts = f"{data['repeats']} rounds interleaved, {_origin_line(data['birth'])}"
    return "\n".join([*lines, "", f"<sub>{facts}</sub>"])


def worst_case() -> str:
    """Writes what each kind of images costs under a cap, on average and at most."""
    data = _read("worst_case.json")
    rows = data["rows"]
    caps = {row["method"]: row["cap"] for row in rows}
    lines = [
        f"| share of the operations: mean, max | images | {' | '.join(caps)} |",
        "|---|--:|" + "--:|" * len(caps),
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        same = [row for row in rows if row["kind"] == kind]
        spent = " | ".join(f"{row['mean']:.3f}, {row['max']:.3f}" for row in same)
        lines.append(f"| {kind} | {same[0]['images']} | {spent} |")
    free = [max(row["max_without_cap"] for row in rows if row["method"] == name) for name in caps]
    lines.append(f"| **the cap** | | {' | '.join(f'**{cap:.3f}**' for cap in caps.values())} |")
    cells = " | ".join(f"{most:.3f}" for most in free)
    lines.append(f"| the most without it, of {data['free']} of each kind | | {cells} |")
    return "\n".join([*lines, "", f"<sub>{_origin_line(data['birth'])}</sub>"])


def large_images() -> str:
    """Writes memory and own time of each method at 1024 pixels, beside the dense model's."""
    data = _read("large_images.json")
    lines = [
        "| DeiT-Ti, 4,097 tokens | tokens left | MACs | peak memory | own time | all |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['method']} | {row['rows']} | {row['macs_share']:.2f} | "
        f"{_aim(row['memory_share'], 1.0)} | {_aim(row['own_time_share'], 0.1)} | "
        f"{row['time_share']:.2f} |"
        if "refused" not in row
        else f"| {row['method']} | refused: not meant for this size | - | - | - | - |"
        for row in data["rows"]
    ]
    facts = f"processor time on one thread, {data['rounds']} rounds, {_origin_line(data['birth'])}"
    key = "Shares of the dense model's; bold: above it, or above a tenth of its time."
    return "\n".join([*lines, "", key, "", f"<sub>{facts}</sub>"])


def executorch() -> str:
    """Writes what ExecuTorch gains by a reduction, and how much of each model it delegates."""
    data = _read("export_speed.json")
    lines = [
        "| DeiT-Ti in ExecuTorch | MACs | MB | delegated | partitions | off by | ms | faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in data["rows"]:
        given, (low, high) = row["delegated"], row["faster_quartiles"]
        lines.append(
            f"| {row['model']} | {row['macs']:.2f} | {row['bytes'] / 1e6:.1f} | "
            f"{given['operators']} of {given['of']} | {given['partitions']} | "
            f"{row['largest_difference']:.0e} | {row['ms']:.1f} | "
            f"{row['faster']:.2f}x [{low:.2f}, {high:.2f}] |"
        )
    key = "off by: the largest difference of an answer to the model's, as a share of the largest."
    facts = f"{data['repeats']} rounds interleaved, {_origin_line(data['birth'])}"
    return "\n".join([*lines, "", key, "", f"<sub>{facts}</sub>"])


def runtimes() -> str:
    """Writes how much faster exported models are than the dense model on the same runtime."""
    rows = _read("runtime_speed.json")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        processor = row["birth"]["processor"].replace("(R)", "").removesuffix(" Processor")
        key = (row["host"], row["target"], row["precision"], row["batch"], processor)
        groups.setdefault(key, []).append(row)
    lines = [
        (
            "| host, runtime, precision, batch, processor | method | MACs | ms | faster [95 %] "
            "| conv. | fused |"
        ),
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    beside_eager = any(row.get("over_eager") for row in rows)
    if beside_eager:
        lines = [f"{lines[0]} eager |", f"{lines[1]}--:|"]
    for key, group in groups.items():
        where = ", ".join(map(str, key))
        for row in group:
            speedup, fused = row["speedup"], row["attention_fused"]
            eager = row.get("over_eager")
            conversion = "-" if row["conversion"] is None else f"{row['conversion']['median']:.2f}"
            lines.append(
                f"| {where} | {row['method']} | {row['macs']:.2f} | "
                f"{row['step_ms']['median']:.1f} | {speedup['median']:.2f}x "
                f"[{speedup['low']:.2f}, {speedup['high']:.2f}] | {conversion} | "
                f"{'-' if fused is None else f'{fused[0]} of {fused[1]}'} |"
            )
            if beside_eager:
                lines[-1] += " - |" if eager is None else f" {eager['median']:.2f}x |"
            where = ""
    facts = dict.fromkeys(
        f"{row['rounds']} rounds in turns, {_origin_line(row['birth'])}" for row in rows
    )
    note = (
        "conv.: speed-up times the share of operations; 1 if time falls as operations do. "
        "fused: attentions that became one kernel."
    )
    if beside_eager:
        note += " eager: speed-up over the dense model in PyTorch."
    return "\n".join([*lines, "", note, "", f"<sub>{'<br>'.join(facts)}</sub>"])


def plans() -> str:
    """Writes what plans predicted beside what was measured, and how many targets were met."""
    rows = _read("plan.json")
    lines = [
        (
            "| host, runtime, precision, batch | asked | method | predicted | measured [95 %] "
            "| of the time asked for | KL (same answers) | found by | in, s |"
        ),
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    where = None
    for row in rows:
        here = ", ".join(str(row[name]) for name in ("host", "runtime", "precision", "batch"))
        here += ", an hour later" if row["later"] else ""
        begin = f"| {here if here != where else ''} | {row['asked']:.2f} |"
        where = here
        if "refused" in row:
            lines.append(f"{begin} {row['method_asked']}: refused | - | - | - | - | - | - |")
            continue
        found = row["measured"]
        by = row["candidates"][0]["by"] if row["candidates"] else "-"
        predicted = "-" if row["predicted"] is None else f"{row['predicted']:.3f}"
        lines.append(
            f"{begin} {row['method']} | {predicted} | {found['median']:.3f} [{found['low']:.3f}, "
            f"{found['high']:.3f}] | {row['latency_ms'] / row['target_ms']:.2f} | "
            f"{row['kl']['value']:.2g} ({row['agreement']['value']:.1%}) | {by} | "
            f"{row['search_seconds']:.0f} |"
        )
    answered = [row for row in rows if "refused" not in row]
    off = sorted(
        abs(row["predicted"] / row["measured"]["median"] - 1)
        for row in answered
        if row["predicted"] is not None
    )
    met = sum(row["latency_ms"] <= 1.05 * row["target_ms"] for row in answered)
    slower = sum(row["measured"]["low"] > 1 for row in answered)
    summary = (
        f"Predicted times are off by {statistics.median(off):.1%} in the median and "
        f"{off[round(0.9 * (len(off) - 1))]:.1%} in nine of ten cells. {met} of {len(answered)} "
        f"targets were met within 5 %, {len(rows) - len(answered)} were refused, and {slower} "
        "answers were slower than dense. Shares are of the dense time in the same rounds; the "
        "target was set by the dense time before the search. found by: the method's own rule, in "
        "its own or in fewer blocks, or the search."
    )
    facts = dict.fromkeys(_origin_line(row["birth"]) for row in rows)
    return "\n".join([*lines, "", summary, "", f"<sub>{'<br>'.join(facts)}</sub>"])


def auto_against() -> str:
    """Writes what `auto` loses in the time that it took, beside what single methods lose in it."""
    rows = _read("auto.json")
    lines = [
        (
            "| runtime, precision, batch | asked | taken | `auto` | best single method | second "
            "| random |"
        ),
        "|---|--:|--:|---|---|---|---|",
    ]
    won: list[bool] = []
    cells = dict.fromkeys((row["runtime"], row["precision"], row["batch"]) for row in rows)
    for cell in cells:
        of_cell = [row for row in rows if (row["runtime"], row["precision"], row["batch"]) == cell]
        curves = _loss_curves(of_cell)
        first = ", ".join(map(str, cell))
        for row in of_cell:
            if row["name"] == "auto":
                line, best = _auto_line(row, curves)
                lines.append(f"| {first} | {line} |")
                won.append(best)
                first = ""
    seconds = [row["search_seconds"] for row in rows if row["name"] == "auto"]
    singles = {row["name"] for row in rows} - {"auto", "random"}
    note = (
        "asked and taken: shares of the dense time. KL with its standard error, on images that did "
        "not choose. Single methods stand at the time that `auto` took: between two of their "
        "measured points, and up to 6 % below the least, the logarithm of KL goes straight. "
        f"`auto` has the lowest KL, or is within one standard error of it, in {sum(won)} of "
        f"{len(won)} rows, beside {len(singles)} methods. A plan took {min(seconds):.0f} to "
        f"{max(seconds):.0f} s."
    )
    facts = dict.fromkeys(_origin_line(row["birth"]) for row in rows)
    return "\n".join([*lines, "", note, "", f"<sub>{'<br>'.join(facts)}</sub>"])


Curves = dict[str, list[tuple[float, dict[str, float]]]]


def _loss_curves(rows: list[dict[str, Any]]) -> Curves:
    """Collects for each single method the times that it took, and what it lost in each."""
    curves: Curves = {}
    for row in rows:
        if row["name"] != "auto":
            point = (row["measured"]["median"], row["kl"])
            curves[row["name"]] = sorted([*curves.get(row["name"], []), point], key=lambda p: p[0])
    return curves


def _auto_line(row: dict[str, Any], curves: Curves) -> tuple[str, bool]:
    """Writes a plan beside the single methods at its time; tells whether none loses less."""
    taken, kl = row["measured"]["median"], Estimate(**row["kl"])

    def loss(name: str) -> Estimate | None:
        points = curves.get(name, [])
        if len(points) < 2 or taken < 0.94 * points[0][0]:
            return None
        for (low, deep), (high, mild) in itertools.pairwise(points):
            if taken <= high:
                along = (taken - low) / (high - low)
                return Estimate(
                    *(deep[e] ** (1 - along) * mild[e] ** along for e in ("value", "error"))
                )
        return Estimate(**points[-1][1])

    found = {name: loss(name) for name in curves if name != "random"}
    single = sorted(
        ((each, name) for name, each in found.items() if each), key=lambda pair: pair[0].value
    )
    beside = [f"`{name}`, {each.show()}" for each, name in single[:2]]
    lot = loss("random")
    cells = [
        f"{row['share']:g} | {taken:.2f} | `{row['method']}`, {kl.show()}",
        *beside,
        *["-"] * (2 - len(beside)),
        lot.show() if lot else "-",
    ]
    best = not single or kl.value <= single[0][0].value + (single[0][0].error or 0)
    return " | ".join(cells), best


def precision() -> str:
    """Writes what lower precisions change, on images that `export` did not get."""
    rows = sorted(_read("precision.json"), key=lambda row: row["cell"])
    lines = [
        (
            "| target, precision | method | KL to dense, float32 | here | more | first answer "
            "| kept | MB | s | how |"
        ),
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        begin = f"| {row['cell']} | {row['method']} | {row['float32_to_dense']:.4f} |"
        if "refused" in row:
            lines.append(f"{begin} refused | - | - | - | - | - | - |")
            continue
        drift, more = row["drift"], row["to_dense"] - row["float32_to_dense"]
        lines.append(
            f"{begin} {row['to_dense']:.4f} | {more:+.4f} | {row['agreement']:.1%} | "
            f"{drift['kept']:.1%} | {row['bytes'] / 1e6:.1f} | {row['seconds']:.0f} | "
            f"{drift['recipe'] or '-'} |"
        )
    facts = dict.fromkeys(
        f"{row['given']} other images given to `export`, {_origin_line(row['birth'])}"
        for row in rows
    )
    note = (
        "first answer: images on which it is that of the slimmed model in float32. kept: patches "
        "that both keep, of those that either keeps, on the images that judged. s: seconds of "
        "`export`, the search included, on a machine that did other work, too."
    )
    return "\n".join([*lines, "", note, "", f"<sub>{'<br>'.join(facts)}</sub>"])


def parity() -> str:
    """Writes how far exported models are from the slimmed ones, a row for each method."""
    data = _read("export.json")
    targets = sorted({row["target"] for row in data["rows"]})
    lines = [
        f"| host | method | {' | '.join(targets)} |",
        f"|---|---|{'--:|' * len(targets)}",
    ]
    cells = {(row["host"], row["setting"], row["target"]): row for row in data["rows"]}
    reasons: dict[str, int] = {}
    for host, setting in sorted({(row["host"], row["setting"]) for row in data["rows"]}):
        found = [cells.get((host, setting, target)) for target in targets]
        shown = [_parity_cell(each, reasons) for each in found]
        lines.append(f"| {host} | {setting} | {' | '.join(shown)} |")
    key = (
        "The largest difference of an answer, as a share of the largest, and how many images were "
        "run; in brackets, how many of them met near ties that went the other way. On all others "
        "every block keeps the same patches, and merges the others into the same. *: by an earlier "
        "check, which did not compare merges. -: not run."
    )
    return _close_table(lines, key, reasons, data["rows"])


def _close_table(
    lines: list[str], key: str, reasons: dict[str, int], rows: list[dict[str, Any]]
) -> str:
    """Adds the key, the numbered reasons of refusals, and where the rows come from."""
    notes = [f"refused {number}: {reason}" for reason, number in reasons.items()]
    facts = dict.fromkeys(_origin_line(row["birth"]) for row in rows)
    return "\n".join(
        [*lines, "", "<br>".join([key, *notes]), "", f"<sub>{'<br>'.join(facts)}</sub>"]
    )


def _say_missing(row: dict[str, Any] | None, reasons: dict[str, int]) -> str | None:
    """A cell that was not run, or is refused for a numbered reason; None if it has figures."""
    if row is None:
        return "-"
    if "refused" in row:
        return f"refused {reasons.setdefault(row['refused'], len(reasons) + 1)}"
    return None


def _parity_cell(row: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    """A cell of the table of parity."""
    missing = _say_missing(row, reasons)
    if row is None or missing is not None:
        return missing or "-"
    ties = sum(row["near_ties"].values()) + row["hidden_ties"]
    told = f"{row['largest_difference']:.0e}, {row['images']}"
    if row["same_answers"] < row["asked"]:
        other = row["asked"] - row["same_answers"]
        told += f", {other} other answer{'s' if other > 1 else ''}"
    told += f" ({ties})" if ties else ""
    return told if "compared" in row else f"{told} *"


def evo_scratch() -> str:
    """Writes Evo-ViT and its dense twin, trained alike from scratch, a row for each seed."""
    whole = _read("evo_cifar.json")
    first = next(iter(whole.values()))["reports"][0]
    batches = " | ".join(
        f"faster, batch {Report.from_json(each).provenance.batch}" for each in first
    )
    lines = [
        f"| CIFAR-10 | seed | MACs | dense, top-1 % | evo | Δ 95 % | {batches} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    facts = []
    for kind, data in whole.items():
        for seed, both in enumerate(data["reports"]):
            reports = [Report.from_json(each) for each in both]
            report, row = reports[0], reports[0].rows[1]
            timed = " | ".join(
                f"{each.median:.2f}x [{each.low:.2f}, {each.high:.2f}]"
                for each in (report.rows[1].speedup for report in reports)
                if each is not None
            )
            lines.append(
                f"| {kind}, {data['course']['epochs']:g} epochs | {seed} | {row.macs_share:.3f} | "
                f"{_percent(report.dense.accuracy)} | {_percent(row.accuracy)} | "
                f"{_interval(row.change)} | {timed} |"
            )
        facts.append(provenance_line(Report.from_json(data["reports"][0][0])))
    return "\n".join([*lines, "", f"<sub>{'<br>'.join(dict.fromkeys(facts))}</sub>"])


def evo_training() -> str:
    """Writes seconds of a step of training, dense and slow-fast interleaved."""
    lines = [
        "| a step of 128 images | seconds | seconds an epoch of 50,000 | faster [quartiles] |",
        "|---|--:|--:|--:|",
    ]
    data = _read("evo_cifar.json")
    for kind, each in data.items():
        for row in each["training"]:
            ratio = row["speedup"]
            lines.append(
                f"| {kind}, {row['name']} | {row['seconds']['median']:.3f} | "
                f"{row['seconds_an_epoch']:.0f} | {ratio['median']:.2f}x "
                f"[{ratio['low']:.2f}, {ratio['high']:.2f}] |"
            )
    return "\n".join([*lines, "", f"<sub>{_origin_line(next(iter(data.values()))['birth'])}</sub>"])


def evo_stock() -> str:
    """Writes Evo-ViT's selection on weights that were not trained for it."""
    report = Report.from_json(_read("evo.json")["stock"])
    rows = [row for row in report.rows if " seed" not in row.name]
    lines = [accuracy_table(rows), *averaged(report.rows)]
    return "\n".join([*lines, "", f"<sub>{provenance_line(report)}</sub>"])


def evo_speed() -> str:
    """Writes how much of what Evo-ViT saves becomes time."""
    lines = [
        "| eager | batch | MACs | measured speed-up [quartiles] | conversion |",
        "|---|--:|--:|--:|--:|",
    ]
    for host, each in _read("evo.json")["speed"].items():
        reports = [Report.from_json(report) for report in each]
        for report in reports:
            for row in report.rows[1:]:
                if row.speedup is None or row.conversion is None:
                    continue
                ratio = row.speedup
                lines.append(
                    f"| {host}: {row.name} | {report.provenance.batch} | {row.macs_share:.3f} | "
                    f"{ratio.median:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] | "
                    f"{row.conversion:.2f} |"
                )
    return "\n".join([*lines, "", f"<sub>{provenance_line(reports[0])}</sub>"])


def _aim(share: float, most: float) -> str:
    """Writes a share in percent, bold if it is above the aim."""
    return f"{share:.1%}" if share <= most else f"**{share:.1%}**"


def _origin_line(origin: dict[str, Any]) -> str:
    """Writes the provenance in a result on disk (its key there is "birth"), in one line."""
    return (
        f"{origin['images']} image{'' if origin['images'] == 1 else 's'}, {origin['processor']}, "
        f"{origin['dtype']}, torch {origin['versions']['torch']}, "
        f"timm {origin['versions']['timm']}, commit {origin['commit']}, {origin['date'][:10]}: "
        f"`{origin['command']}`"
    )


def _percent(share: Estimate | None) -> str:
    return "-" if share is None else f"{100 * share.value:.1f}"


def _interval(change: Estimate | None) -> str:
    """Writes a difference in points, with its 95 % interval."""
    if change is None or change.error is None:
        return "-"
    return f"{100 * change.value:+.1f} ±{196 * change.error:.1f}"


def growth() -> str:
    """Writes each method's own work as a share of the dense forward pass, by number of tokens."""
    data = _read("growth.json")
    sizes = sorted({row["tokens"] for row in data["rows"]})
    names = sorted({row["method"] for row in data["rows"]})
    cells = {(row["method"], row["tokens"]): row for row in data["rows"]}
    lines = [
        f"| method | {' | '.join(f'{size} tokens' for size in sizes)} |",
        f"|---|{'--:|' * len(sizes)}",
    ]
    reasons: dict[str, int] = {}
    for name in names:
        shown = [_growth_cell(cells.get((name, size)), reasons) for size in sizes]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    note = (
        f"Own time, own peak memory and the whole model's peak memory as shares of the dense "
        f"host's, and measured speed-up, at {data['share']:.0%} of its MACs. Of `mctf` and "
        "`idlevit`, which decide on the attention map, own time is deciding alone. -: not run."
    )
    return _close_table(lines, note, reasons, data["rows"])


def every_method(cell: Callable[[Row, Row], str]) -> str:
    """Writes a row for each method of `bench`, the best first, and a column for each budget."""
    report = Report.load(RESULTS / "bench" / "report.json")
    rows = {row.name: row for row in report.rows if " " in row.name}  # those with a budget
    budgets = sorted({name.split()[-1] for name in rows}, reverse=True)
    methods = {row.method for row in rows.values()} - {"random"}

    def worst(method: str) -> tuple[int, float]:
        kls = [rows[name].kl for name in (f"{method} {each}" for each in budgets) if name in rows]
        return -len(kls), kls[-1].value if kls and kls[-1] else 0.0

    lines = [f"| method | {' | '.join(budgets)} |", f"|---|{'---|' * len(budgets)}"]
    for method in sorted(methods, key=worst):
        cells = []
        for budget in budgets:
            row, twin = (rows.get(f"{each}{method} {budget}") for each in ("", "random/"))
            cells.append("-" if row is None else cell(row, twin or row))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"<sub>{provenance_line(report)}</sub>"])


def _answers_cell(row: Row, twin: Row) -> str:
    """Writes KL, that of random patches at the same counts, agreement, and top-1."""
    if row.kl is None or twin.kl is None:
        return "-"
    beside = "" if twin is row else f" ({twin.kl.value:.2g})"
    return f"{row.kl.value:.2g}{beside}, {_percent(row.agreement)}, {_percent(row.accuracy)}"


def _speed_cell(row: Row, twin: Row) -> str:
    """Writes the speed-up, and that of random patches at the same counts."""
    if row.speedup is None or twin.speedup is None:
        return "-"
    beside = "" if twin is row else f" ({twin.speedup.median:.2f}x)"
    return f"{row.speedup.median:.2f}x{beside}"


def bench_twice() -> str:
    """Says in two sentences how far two runs of `bench` differ."""
    data = _read("bench_twice.json")
    dates = " and ".join(each["date"][:16].replace("T", " ") for each in data["runs"])
    return (
        f"Timed twice, at {dates} UTC, with the same answers: of {data['timed']} measured "
        f"speed-ups, {data['inside']} lie "
        f"between the quartiles of the first run and {data['within_5_percent']} within 5 % of its "
        f"median; the median difference is {data['median_apart']:.1%}. Load averages were "
        f"{data['runs'][0]['load'][0]} and {data['runs'][1]['load'][0]} on two processors."
    )


def fewer_decisions() -> str:
    """Writes what `similarity` loses by deciding in fewer blocks, and what time it gains."""
    data = {
        budget: Report.from_json(each) for budget, each in _read("fewer_decisions.json").items()
    }
    names = [row.name for row in next(iter(data.values())).rows[1:] if row.method != "random"]
    lines = [f"| KL, same answers %, speed-up | {' | '.join(f'{each} MACs' for each in data)} |"]
    lines.append(f"|---|{'---|' * len(data)}")
    for name in names:
        rows = [next(row for row in report.rows if row.name == name) for report in data.values()]
        cells = [
            f"{row.kl.value:.2g}, {_percent(row.agreement)}, {row.speedup.median:.2f}x"
            for row in rows
            if row.kl is not None and row.speedup is not None
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"<sub>{provenance_line(next(iter(data.values())))}</sub>"])


def _growth_cell(row: dict[str, Any] | None, reasons: dict[str, int]) -> str:
    """A cell of the table of growth."""
    missing = _say_missing(row, reasons)
    if row is None or missing is not None:
        return missing or "-"
    return (
        f"{row['own_time_share']:.1%}, {row['own_memory_share']:.0%}, {row['memory_share']:.0%}, "
        f"{row['speedup']:.2f}x"
    )


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def tables() -> dict[str, Callable[[], str]]:
    """Makes every table, by its name."""
    methods = {
        f"method-{name}": lambda name=name: deit_tiny(lambda row: row.method in ("dense", name))
        for name in ("tome", "evit", "topk", "random")
    }
    beside = {
        f"peers-{name}": lambda name=name: peers(name)
        for name in dict.fromkeys(peer.name.split()[0] for peer in PEERS)
    }
    alone = {f"learned-{name}": lambda name=name: learned(name, "tome") for name in LEARNED}
    main = {"dense", "tome r=8", "tome r=13", "tome r=16", "evit 0.9 fused", "evit 0.7 fused"}
    main |= {"evit 0.5 fused", "evit 0.7 not fused", "topk 0.7", "tome macs=0.65, exact tail"}
    return {
        **beside,
        "front": front,
        "front-speed": front_speed,
        "families": families,
        "accuracy": lambda: deit_tiny(lambda row: row.name in main),
        "accuracy-all": lambda: deit_tiny(lambda _: True),
        "speed": speed,
        "growth": growth,
        "bench-twice": bench_twice,
        "fewer-decisions": fewer_decisions,
        "every-method": lambda: every_method(_answers_cell),
        "every-method-speed": lambda: every_method(_speed_cell),
        "coverage": lambda: coverage_tables.libraries(_read("coverage.json")),
        "coverage-families": lambda: coverage_tables.families(_read("coverage.json")),
        "coverage-reasons": lambda: coverage_tables.reasons(_read("coverage.json")),
        "family-laws": family_laws,
        "documents": documents,
        "similarity": lambda: similarity(lambda name: name in SIDE_BY_SIDE or name == "random"),
        "similarity-deep": lambda: similarity(lambda name: name != "dense", "similarity_deep.json"),
        "method-similarity": lambda: similarity(lambda name: name != "dense"),
        "method-ats": lambda: similarity(lambda name: name in ("ats", "tome", "topk")),
        "per-image-speed": per_image_speed,
        "worst-case": worst_case,
        "evo-scratch": evo_scratch,
        "evo-training": evo_training,
        "evo-stock": evo_stock,
        "evo-speed": evo_speed,
        "large-images": large_images,
        "executorch": executorch,
        "runtimes": runtimes,
        "parity": parity,
        "plans": plans,
        "auto-against": auto_against,
        "precision": precision,
        "trained": lambda: trained("trained"),
        "trained-longer": lambda: trained(*LONGER),
        "trained-half": lambda: "\n\n".join(
            trained(f"trained_half_{budget}", of=f"DeiT-Ti, 0.{budget} MACs")
            for budget in ("55", "45")
        ),
        "learned": learned,
        **alone,
        "train-speed": train_speed,
        "slimming": slimming,
        "slimming-choices": choices,
        **methods,
    }


def filled(text: str) -> str:
    """Replaces every known table in the text."""
    known = tables()

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table:{name} -->\n\n{known[name]()}\n\n<!-- end -->"

    return MARK.sub(table, text)


def growth_figure(rows: list[dict[str, Any]]) -> str:
    """Draws a line a method: its own time as a share of the dense forward pass (SVG)."""
    colours = {"tome": "#2563eb", "evit": "#d97706", "topk": "#059669", "random": "#6b7280"}
    rows = [row for row in rows if row["method"] in colours and "refused" not in row]
    sizes = sorted({row["tokens"] for row in rows})
    top = max(row["own_time_share"] for row in rows) * 1.15
    left, width, height, bottom = 60, 430, 220, 260

    def x(tokens: int) -> float:
        return left + width * sizes.index(tokens) / max(len(sizes) - 1, 1)

    def y(share: float) -> float:
        return float(bottom - height * share / top)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 310" font-size="12">',
        '<rect width="600" height="310" fill="white"/>',
        '<text x="60" y="24">own time of a method, share of the dense forward pass</text>',
    ]
    for step in range(5):
        share = top * step / 4
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            f'stroke="#e5e7eb"/><text x="8" y="{y(share) + 4:.1f}">{share:.1%}</text>'
        )
    parts += [f'<text x="{x(size) - 12:.1f}" y="280">{size}</text>' for size in sizes]
    parts.append('<text x="240" y="302">tokens</text>')
    ends: list[float] = []
    for name, colour in colours.items():
        points = [(x(r["tokens"]), y(r["own_time_share"])) for r in rows if r["method"] == name]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        label = points[-1][1]
        while any(abs(label - other) < 13 for other in ends):
            label -= 13
        ends.append(label)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{left + width + 8}" y="{label + 4:.1f}" fill="{colour}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Rewrites the tables, or checks them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    wanted = {
        page: filled(page.read_text(encoding="utf-8"))
        for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    }
    wanted[ROOT / "docs" / "growth.svg"] = growth_figure(_read("growth.json")["rows"])
    stale = [
        page
        for page, text in wanted.items()
        if not page.exists() or page.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date: run `make tables`.")
        sys.exit(1 if stale else 0)
    for page in stale:
        page.write_text(wanted[page], encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
