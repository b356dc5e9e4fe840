"""The laws of methods: what the rest of the package relies on.

Choices are tried on random tokens (`Trial.decisions`), everything else on a tiny host.
"""

from __future__ import annotations

import copy
import json
import pickle
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchslim.errors import BadSchedule, NeedsClassToken, ShortSchedule
from patchslim.methods import LearnedMethod, Method
from patchslim.methods._method import method_settings
from patchslim.methods._registry import find_method, make_method, method_names
from patchslim.model.slim import slim
from patchslim.schedules.schedule import Counts
from patchslim.testing.counting import count_macs
from patchslim.testing.law import Law, Violation, check_law, require, require_close
from patchslim.testing.token_checks import check_origin, check_same_tokens, check_sizes, real_rows
from patchslim.testing.trial import PATCHES, READOUTS, Trial, noise_images, uneven_images
from patchslim.tokens.reduction import Reduction
from patchslim.tokens.tokens import Tokens


def check_method(method: Method, *, width: int = 16) -> None:
    """Raises `BrokenLaw` for the first law that your method does not keep.

    Args:
        method: the method, with the settings to check. It is not changed.
        width: channels of the tokens that it is tried on. Matters if it has parameters for one
            width.
    """
    trial = Trial(copy.deepcopy(make_method(method, {})).eval(), width)
    for law in METHOD_LAWS:
        check_law(law, trial, type(method).__name__)


def chooses_among_the_patches(trial: Trial) -> None:
    """`choose` raises nothing, and returns a reduction to rows that are there.

    Rows are counted from the first patch: prefix rows do not count.
    """
    counts = trial.keep_counts(PATCHES)
    for prefix in (0, 2) if counts else ():
        scene = trial.scene(prefix=prefix)
        with torch.no_grad():
            try:
                made = trial.method.choose(scene.tokens, scene.signals, max(counts))
            except NeedsClassToken as error:
                raise Violation(f"{error} Set needs_class_token = True.") from error
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Violation(
                    f"choose() raised {type(error).__name__}: {error} "
                    f"({Path(where.filename).name}, line {where.lineno}: {where.line})"
                ) from error
        require(
            isinstance(made, Reduction),
            f"choose() returned a {type(made).__name__}; return a Reduction, such as Keep(rows)",
        )
        rows = getattr(made, "kept", None)
        last = 0 if rows is None else int(rows.max())
        require(
            last < scene.tokens.patches,
            f"row {last} of {scene.tokens.patches} patches with {prefix} prefix rows before them. "
            "Cut these off: tokens.x[:, tokens.prefix :], signals.v[:, :, signals.prefix :]",
        )


def leaves_exactly_the_scheduled_count(trial: Trial) -> None:
    """Exactly `keep` patch rows come out, for every count that `fewest` allows.

    If the method is adaptive: at least one row of each image, at most `keep`, and padding last.
    """
    for patches in range(1, 40):
        fewest = trial.method.fewest(patches)
        require(1 <= fewest <= patches, f"fewest({patches}) = {fewest}")
    for scene, keep, after in trial.decisions():
        batch, rows, width = scene.tokens.x.shape
        wanted = (batch, rows - scene.tokens.patches + keep, width)
        require(
            tuple(after.x.shape) == wanted,
            f"{(*after.x.shape,)} for {keep} of {_describe(scene.tokens)}",
        )
        shapes = {tuple(t.shape) for t in (after.cells(), after.sizes())}
        require(
            shapes == {(batch, keep)}, f"positions and sizes of shapes {shapes} for {keep} rows"
        )
        require(
            trial.method.adaptive or after.alive is None, "there is padding, but adaptive is False"
        )
        if after.alive is not None:
            real = after.alive.sum(dim=1, keepdim=True)
            require(bool((real >= 1).all()), f"nothing is left of {_describe(scene.tokens)}")
            require(torch.equal(after.alive, after.rows() < real), "padding before real rows")
    model = trial.model()
    with torch.no_grad():
        left = [tokens.x.shape[1] for tokens in model.trace(noise_images())]
    require(left == list(model.counts()), f"{left} in a model, scheduled {list(model.counts())}")


def prefix_rows_come_first_and_unchanged(trial: Trial) -> None:
    """Class, distillation and register tokens are never removed, merged or moved."""
    for scene, keep, after in trial.decisions():
        prefix = scene.tokens.prefix
        same = torch.equal(after.x[:, :prefix], scene.tokens.x[:, :prefix])
        require(
            same and after.prefix == prefix, f"prefix changed, {keep} of {_describe(scene.tokens)}"
        )


def rows_that_stay_are_distinct(trial: Trial) -> None:
    """No row is kept twice: the rows that stay come from different grid cells."""
    for scene, keep, after in trial.decisions():
        patches = scene.tokens.patches
        for cells in real_rows(after, after.cells()):
            require(
                len(cells.unique()) == len(cells),
                f"a row twice, {keep} of {_describe(scene.tokens)}",
            )
            require(bool(((cells >= 0) & (cells < patches)).all()), f"cells beyond {patches}")


def sizes_add_up(trial: Trial) -> None:
    """Sizes sum to the number of patches if rows join, and to no more if rows are dropped."""
    for scene, _, after in trial.decisions():
        check_sizes(after, scene.tokens.patches)
    for tokens in _trace(trial):
        check_sizes(tokens, PATCHES, joined=False)


def the_map_back_to_the_pixels_is_right(trial: Trial) -> None:
    """Every grid cell leads to the row that stands for it, or to none if it was dropped."""
    for _, _, after in trial.decisions():
        check_origin(after)
    for tokens in _trace(trial):
        check_origin(tokens)


def chooses_the_same_every_time(trial: Trial) -> None:
    """The same tokens give the same choice, whatever torch's seed, and in a copy, too."""
    scene = trial.scene()
    for keep in trial.keep_counts(PATCHES):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1)
            first = trial.decide(scene, keep)
            torch.default_generator.manual_seed(2)
            check_same_tokens(trial.decide(scene, keep), first, "asked again")
            copied = Trial(copy.deepcopy(trial.method), trial.width)
            check_same_tokens(copied.decide(scene, keep), first, "a copy asked")


def an_image_does_not_depend_on_its_batch(trial: Trial) -> None:
    """Alone, in a batch, or in another order of the batch, an image gets the same rows."""
    for prefix in (0, 1, 2, 5):
        scene = trial.scene(prefix=prefix)
        for keep in trial.keep_counts(PATCHES):
            together = trial.decide(scene, keep)
            for images in ([1], [2, 0, 1], [0, 0]):
                wanted = replace(
                    together,
                    x=together.x[images],
                    size=None if together.size is None else together.size[images],
                    position=together.cells()[images],
                    alive=None if together.alive is None else together.alive[images],
                )
                check_same_tokens(
                    trial.decide(scene.select(images), keep), wanted, f"images {images}"
                )


def padding_changes_nothing(trial: Trial) -> None:
    """In an adaptive method, rows of padding among the tokens change no choice."""
    if not trial.method.adaptive:
        return
    for prefix in (0, 1, 2):
        scene = trial.scene(prefix=prefix)
        for keep in trial.keep_counts(PATCHES):
            got = trial.decide(scene.pad(5), keep)
            check_same_tokens(got, trial.decide(scene, keep), f"with padding, {keep} of {PATCHES}")


def packed_is_padded_is_alone(trial: Trial) -> None:
    """Packed, padded, alone, or in another order, an image gets the same answer and costs."""
    if not trial.method.adaptive:
        return
    trial = Trial(
        copy.deepcopy(trial.method).double(), trial.width
    )  # so that rounding cannot change a choice
    images = uneven_images(5).double()
    for readout in ("class", "query") if trial.method.needs_class_token else READOUTS:
        for tail in ("full", "exact"):
            model = trial.model(readout, tail=tail, depth=4).double()
            with torch.no_grad():
                packed, costs = model.forward_with_costs(images)
                alone = [model.forward_with_costs(image) for image in images.split(1)]
                model.packs = False
                padded, padded_costs = model.forward_with_costs(images)
            who = f"{readout}, tail={tail!r}"
            alone_costs = [each[1][0] for each in alone]
            require(costs == padded_costs == alone_costs, f"other costs: {who}")
            require(
                max(cost.total for cost in costs) <= model.macs().total, f"above the most: {who}"
            )
            require_close(packed, padded, 1e-5, f"packed, not padded: {who}")
            require_close(packed, torch.cat([each[0] for each in alone]), 1e-5, f"alone: {who}")
            model.packs = True
            require_close(_run(model, images.flip(0)).flip(0), packed, 1e-5, f"reversed: {who}")


def half_precision_stays_finite(trial: Trial) -> None:
    """In float16 and bfloat16, rows and sizes are finite and counts exact."""
    for dtype in (torch.float16, torch.bfloat16):
        halved = Trial(copy.deepcopy(trial.method).to(dtype), trial.width)
        for prefix in (0, 1):
            scene = halved.scene((7, 5), prefix=prefix, dtype=dtype)
            for keep in halved.keep_counts(35):
                after = halved.decide(scene, keep)
                require(after.x.dtype == dtype, f"{dtype} became {after.x.dtype}")
                require(bool(after.x.isfinite().all()), f"{dtype}: a row is not finite")
                check_sizes(after, 35)


def settings_make_an_equal_method(trial: Trial) -> None:
    """Its settings, saved as JSON, make a method that chooses the same."""
    settings = method_settings(trial.method)
    back = json.loads(json.dumps(settings))
    require(back == settings, f"{settings} became {back} in JSON")
    again = type(trial.method)(**back).eval()
    if isinstance(again, LearnedMethod):
        again.prepare(trial.width, trial.decision_blocks)
    again.load_state_dict(trial.method.state_dict())
    require(method_settings(again) == settings, f"{settings} became {method_settings(again)}")
    require(repr(again) == repr(trial.method), f"{trial.method!r} became {again!r}")
    scene = trial.scene()
    for keep in trial.keep_counts(PATCHES):
        check_same_tokens(
            Trial(again, trial.width).decide(scene, keep), trial.decide(scene, keep), "made again"
        )


def pickles(trial: Trial) -> None:
    """A slimmed model can be pickled and copied, and gives the same answer."""
    model, images = trial.model(), noise_images()
    wanted = _run(model, images)
    require_close(_run(pickle.loads(pickle.dumps(model)), images), wanted, 1e-6, "unpickled")
    require_close(_run(copy.deepcopy(model), images), wanted, 1e-6, "copied")


def compiles_whole(trial: Trial) -> None:
    """A slimmed model compiles as one graph (`fullgraph=True`) and gives the same answer."""
    model, images = trial.model(depth=2), noise_images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    require_close(_run(compiled, images), _run(model, images), 1e-6, "compiled")
    torch.compiler.reset()


def exports(trial: Trial) -> None:
    """A slimmed model passes `torch.export` with a free batch size and gives the same answer."""
    model, images = trial.model(depth=2), noise_images(5)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images[:3],), dynamic_shapes=({0: batch},), strict=False)
    for count in (2, 5):
        some = images[:count]
        require_close(_run(program.module(), some), _run(model, some), 1e-6, f"exported, {count}")


def the_exact_tail_gives_the_same_answer(trial: Trial) -> None:
    """Computing only the rows that the head reads in the last block changes nothing."""
    images = noise_images()
    full, exact = trial.model(tail="full"), trial.model(tail="exact")
    require_close(_run(exact, images), _run(full, images), 1e-5, "exact tail")
    require(exact.macs().total < full.macs().total, "the exact tail saves nothing")


def macs_are_what_it_spends(trial: Trial) -> None:
    """`macs()` agrees within 0.5 % with what torch counts while the model runs."""
    for tail in ("full", "exact"):
        model = trial.model(tail=tail)
        with torch.no_grad():
            cost = model.macs_of(noise_images(1))[0]
        whole = model.macs()
        require(
            cost == whole or trial.method.adaptive, f"one image costs {cost}, macs() is {whole}"
        )
        ours, torchs = cost.total + cost.choosing, count_macs(model, noise_images(1))
        require(
            abs(ours / torchs - 1) <= 0.005,
            f"macs() with choosing is {ours}, torch counts {torchs}, tail={tail!r}",
        )


def says_whether_it_needs_a_class_token(trial: Trial) -> None:
    """If it needs a class token, hosts with nothing in its place are refused, with alternatives."""
    images = noise_images()
    for readout in ("class", "query"):
        require(bool(_run(trial.model(readout), images).isfinite().all()), f"not finite: {readout}")
    if not trial.method.needs_class_token:
        require(bool(_run(trial.model("average"), images).isfinite().all()), "not finite: average")
        return
    try:
        slim(trial.host("average"), trial.method, trial.schedule(prefix=0))
    except NeedsClassToken as error:
        free = [name for name in method_names() if not find_method(name).needs_class_token]
        require(all(name in str(error) for name in free), f"no alternatives in: {error}")
        return
    raise Violation("a host without class token was accepted")


def impossible_counts_are_refused(trial: Trial) -> None:
    """Counts that rise are an error, and counts below `fewest` are a warning."""
    host = trial.host()
    try:
        slim(host, trial.method, Counts((17, 17, 18), PATCHES + 1, 1))
    except BadSchedule:
        pass
    else:
        raise Violation("a rising schedule was accepted")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = trial.decision_blocks[0]
        asked = [PATCHES + 1] * first + [2] * (3 - first)
        left = slim(host, trial.unprepared(), keep=asked).counts()
    short = any(issubclass(warning.category, ShortSchedule) for warning in caught)
    rows, wanted = PATCHES, [PATCHES + 1] * first
    for _ in range(first, 3):
        rows = trial.method.fewest(rows)
        wanted.append(rows + 1)
    require(left == tuple(wanted), f"asked for {asked} tokens: left {left}, wanted {wanted}")
    require(short == (wanted != asked), f"asked for {asked}, left {left}, warned: {short}")


def every_parameter_learns(trial: Trial) -> None:
    """Each of its parameters gets a finite gradient in training, and not only zeros."""
    method = copy.deepcopy(trial.method)
    # Four blocks, since a choice on the queries of the last one changes nothing for the head.
    model = Trial(method, trial.width).model(depth=4).train()
    output: Tensor = model(noise_images())
    output.square().sum().backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            require(gradient is not None, f"{name} gets no gradient")
            if gradient is not None:
                require(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite")
                require(bool(gradient.any()), f"the gradient of {name} is zero")


METHOD_LAWS: tuple[Law[Trial], ...] = (
    chooses_among_the_patches,
    leaves_exactly_the_scheduled_count,
    prefix_rows_come_first_and_unchanged,
    rows_that_stay_are_distinct,
    sizes_add_up,
    the_map_back_to_the_pixels_is_right,
    chooses_the_same_every_time,
    an_image_does_not_depend_on_its_batch,
    padding_changes_nothing,
    packed_is_padded_is_alone,
    half_precision_stays_finite,
    settings_make_an_equal_method,
    says_whether_it_needs_a_class_token,
    impossible_counts_are_refused,
    the_exact_tail_gives_the_same_answer,
    macs_are_what_it_spends,
    every_parameter_learns,
    pickles,
    compiles_whole,
    exports,
)


def _describe(tokens: Tokens) -> str:
    """Describes tokens in a message."""
    return f"{tokens.patches} patches (prefix {tokens.prefix})"


def _run(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Runs a model without gradients."""
    with torch.no_grad():
        output: Tensor = model(images)
    return output


def _trace(trial: Trial) -> list[Tokens]:
    """Returns the tokens after each block of a tiny host."""
    with torch.no_grad():
        return trial.model().trace(noise_images())
