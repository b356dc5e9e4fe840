"""The laws of methods: what the core and everybody who measures relies on.

Decisions are put to the test on made-up tokens (`Trial.decisions`), everything else on a tiny host.
"""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchslim.errors import BadSchedule, NeedsClassToken, ShortSchedule
from patchslim.methods._method import Reducer
from patchslim.methods._registry import find_reducer, reducer_names
from patchslim.model.slim import slim
from patchslim.schedules.schedule import Counts
from patchslim.testing.counting import counted_macs
from patchslim.testing.law import Law, Observed, insist, insist_close, uphold
from patchslim.testing.trial import PATCHES, READOUTS, Trial, noise_images, uneven_images
from patchslim.tokens.tokens import Tokens


def check_reducer(reducer: Reducer, *, width: int = 16) -> None:
    """Raises `BrokenLaw` for the first law that a method of your own does not keep.

    Args:
        reducer: the method, with the settings to be checked; it is not changed.
        width: channels of the tokens that it is made for, where it has parameters of its own.
    """
    trial = Trial(copy.deepcopy(reducer).eval(), width)
    for law in METHOD_LAWS:
        uphold(law, trial, type(reducer).__name__)


def leaves_exactly_the_scheduled_count(trial: Trial) -> None:
    """Exactly `keep` patch rows come out, for every count that `fewest` allows.

    Where images keep different numbers: at least one of each image, at most `keep`, and the rest is
    padding, which comes last.
    """
    for patches in range(1, 40):
        fewest = trial.reducer.fewest(patches)
        insist(1 <= fewest <= patches, f"fewest({patches}) = {fewest}")
    for scene, keep, after in trial.decisions():
        batch, rows, width = scene.tokens.x.shape
        wanted = (batch, rows - scene.tokens.patches + keep, width)
        insist(
            tuple(after.x.shape) == wanted, f"{(*after.x.shape,)} for {keep} of {_of(scene.tokens)}"
        )
        shapes = {tuple(t.shape) for t in (after.cells(), after.sizes())}
        insist(shapes == {(batch, keep)}, f"positions and sizes of shapes {shapes} for {keep} rows")
        insist(trial.reducer.adaptive or after.alive is None, "padding, in a method not adaptive")
        if after.alive is not None:
            real = after.alive.sum(dim=1, keepdim=True)
            insist(bool((real >= 1).all()), f"nothing is left of {_of(scene.tokens)}")
            insist(torch.equal(after.alive, after.rows() < real), "padding before real rows")
    model = trial.model()
    with torch.no_grad():
        left = [tokens.x.shape[1] for tokens in model.trace(noise_images())]
    insist(left == list(model.counts()), f"{left} in a model, scheduled {list(model.counts())}")


def prefix_rows_come_first_and_unchanged(trial: Trial) -> None:
    """Class, distillation and register tokens are never removed, merged or moved."""
    for scene, keep, after in trial.decisions():
        prefix = scene.tokens.prefix
        same = torch.equal(after.x[:, :prefix], scene.tokens.x[:, :prefix])
        insist(same and after.prefix == prefix, f"prefix changed, {keep} of {_of(scene.tokens)}")


def rows_that_stay_are_distinct(trial: Trial) -> None:
    """No row is kept twice: each row that stays speaks from a grid cell of its own."""
    for scene, keep, after in trial.decisions():
        patches = scene.tokens.patches
        for cells in _real(after, after.cells()):
            insist(len(cells.unique()) == len(cells), f"a row twice, {keep} of {_of(scene.tokens)}")
            insist(bool(((cells >= 0) & (cells < patches)).all()), f"cells beyond {patches}")


def sizes_add_up(trial: Trial) -> None:
    """Sizes sum to the number of patches where rows join, and never to more where they go."""
    for scene, _, after in trial.decisions():
        _check_sizes(after, scene.tokens.patches, joined=after.size is not None)
    for tokens in _traced(trial):
        _check_sizes(tokens, PATCHES, joined=False)


def the_map_back_to_the_pixels_is_right(trial: Trial) -> None:
    """Every grid cell leads to the row that stands for it now, or to none where it was dropped."""
    for _, _, after in trial.decisions():
        _check_origin(after)
    for tokens in _traced(trial):
        _check_origin(tokens)


def chooses_the_same_every_time(trial: Trial) -> None:
    """The same tokens give the same choice, whatever torch's own seed; so does a copy."""
    scene = trial.scene()
    for keep in trial.keeps(PATCHES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            first = trial.decide(scene, keep)
            torch.manual_seed(2)
            _check_same(trial.decide(scene, keep), first, "asked again")
            copied = Trial(copy.deepcopy(trial.reducer), trial.width)
            _check_same(copied.decide(scene, keep), first, "a copy asked")


def an_image_does_not_depend_on_its_batch(trial: Trial) -> None:
    """Alone, in a batch, in another order of the batch: the same choice and the same rows."""
    for prefix in (0, 1, 2, 5):
        scene = trial.scene(prefix=prefix)
        for keep in trial.keeps(PATCHES):
            together = trial.decide(scene, keep)
            for images in ([0], [1], [2], [2, 0, 1], [1, 1]):
                wanted = replace(
                    together,
                    x=together.x[images],
                    size=None if together.size is None else together.size[images],
                    position=together.cells()[images],
                    alive=None if together.alive is None else together.alive[images],
                )
                _check_same(trial.decide(scene.of(images), keep), wanted, f"images {images}")


def padding_changes_nothing(trial: Trial) -> None:
    """Where images keep different numbers: rows of padding that enter change no decision."""
    if not trial.reducer.adaptive:
        return
    for prefix in (0, 1, 2):
        scene = trial.scene(prefix=prefix)
        for keep in trial.keeps(PATCHES):
            got = trial.decide(scene.padded(5), keep)
            _check_same(got, trial.decide(scene, keep), f"with padding, {keep} of {PATCHES}")


def packed_is_padded_is_alone(trial: Trial) -> None:
    """Packed, padded and masked, alone, in another order: the same answer and the same costs."""
    if not trial.reducer.adaptive:
        return
    trial = Trial(copy.deepcopy(trial.reducer).double(), trial.width)  # so that rounding has no say
    images = uneven_images(5).double()
    for readout in ("class", "query") if trial.reducer.needs_class_token else READOUTS:
        for tail in ("full", "exact"):
            model = trial.model(readout, tail=tail, depth=4).double()
            with torch.no_grad():
                packed, costs = model.answer(images)
                alone = [model.answer(image) for image in images.split(1)]
                model.packs = False
                apart, told = model.answer(images)
            who = f"{readout}, tail={tail!r}"
            insist(costs == told == [each[1][0] for each in alone], f"other costs: {who}")
            insist(
                max(cost.total for cost in costs) <= model.macs().total, f"above the most: {who}"
            )
            insist_close(packed, apart, 1e-5, f"packed, not padded: {who}")
            insist_close(packed, torch.cat([each[0] for each in alone]), 1e-5, f"alone: {who}")
            model.packs = True
            insist_close(_run(model, images.flip(0)).flip(0), packed, 1e-5, f"reversed: {who}")


def half_precision_stays_finite(trial: Trial) -> None:
    """In float16 and bfloat16 rows and sizes are finite and the counts exact."""
    for dtype in (torch.float16, torch.bfloat16):
        halved = Trial(copy.deepcopy(trial.reducer).to(dtype), trial.width)
        for prefix in (0, 1):
            scene = halved.scene((7, 5), prefix=prefix, dtype=dtype)
            for keep in halved.keeps(35):
                after = halved.decide(scene, keep)
                insist(after.x.dtype == dtype, f"{dtype} became {after.x.dtype}")
                insist(bool(after.x.isfinite().all()), f"{dtype}: a row is not finite")
                _check_sizes(after, 35, joined=after.size is not None)


def settings_make_an_equal_method(trial: Trial) -> None:
    """`settings()` survives JSON, and makes a method that chooses the same."""
    settings = trial.reducer.settings()
    back = json.loads(json.dumps(settings))
    insist(back == settings, f"{settings} became {back} in JSON")
    again = type(trial.reducer)(**back).eval()
    again.prepare(trial.width, trial.deciding)
    again.load_state_dict(trial.reducer.state_dict())
    insist(again.settings() == settings, f"{settings} became {again.settings()}")
    insist(repr(again) == repr(trial.reducer), f"{trial.reducer!r} became {again!r}")
    scene = trial.scene()
    for keep in trial.keeps(PATCHES):
        _check_same(
            Trial(again, trial.width).decide(scene, keep), trial.decide(scene, keep), "made again"
        )


def pickles(trial: Trial) -> None:
    """A slimmed model survives pickle and deepcopy and gives the same answer."""
    model, images = trial.model(), noise_images()
    wanted = _run(model, images)
    insist_close(_run(pickle.loads(pickle.dumps(model)), images), wanted, 1e-6, "unpickled")
    insist_close(_run(copy.deepcopy(model), images), wanted, 1e-6, "copied")


def compiles_whole(trial: Trial) -> None:
    """A slimmed model compiles as one graph (`fullgraph=True`) and gives the same answer."""
    model, images = trial.model(depth=2), noise_images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    insist_close(_run(compiled, images), _run(model, images), 1e-6, "compiled")
    torch.compiler.reset()


def exports(trial: Trial) -> None:
    """A slimmed model passes `torch.export` with a free batch size and gives the same answer."""
    model, images = trial.model(depth=2), noise_images(5)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images[:3],), dynamic_shapes=({0: batch},), strict=False)
    for count in (2, 5):
        some = images[:count]
        insist_close(_run(program.module(), some), _run(model, some), 1e-6, f"exported, {count}")


def the_exact_tail_gives_the_same_answer(trial: Trial) -> None:
    """Computing only the rows that the head reads in the last block changes nothing."""
    images = noise_images()
    full, exact = trial.model(tail="full"), trial.model(tail="exact")
    insist_close(_run(exact, images), _run(full, images), 1e-5, "exact tail")
    insist(exact.macs().total < full.macs().total, "the exact tail saves nothing")


def macs_are_what_it_spends(trial: Trial) -> None:
    """`macs()` is, within 0.5 % of the model, what torch counts in the running model."""
    for tail in ("full", "exact"):
        model = trial.model(tail=tail)
        with torch.no_grad():
            cost = model.macs_of(noise_images(1))[0]
        whole = model.macs()
        insist(cost == whole or trial.reducer.adaptive, f"an image costs {cost}, told {whole}")
        told, counted = cost.total + cost.choosing, counted_macs(model, noise_images(1))
        insist(abs(told / counted - 1) <= 0.005, f"told {told}, counted {counted}, tail={tail!r}")


def says_whether_it_needs_a_class_token(trial: Trial) -> None:
    """If it needs a class token it is refused, with alternatives, where nothing can stand in."""
    images = noise_images()
    for readout in ("class", "query"):
        insist(bool(_run(trial.model(readout), images).isfinite().all()), f"not finite: {readout}")
    if not trial.reducer.needs_class_token:
        insist(bool(_run(trial.model("average"), images).isfinite().all()), "not finite: average")
        return
    try:
        slim(trial.host("average"), trial.reducer, trial.schedule(prefix=0))
    except NeedsClassToken as error:
        free = [name for name in reducer_names() if not find_reducer(name).needs_class_token]
        insist(all(name in str(error) for name in free), f"no alternatives in: {error}")
        return
    raise Observed("a host without class token was accepted")


def impossible_counts_are_refused(trial: Trial) -> None:
    """Counts that rise are an error, and counts below what it can leave are a warning."""
    host = trial.host()
    try:
        slim(host, trial.reducer, Counts((17, 17, 18), PATCHES + 1, 1))
    except BadSchedule:
        pass
    else:
        raise Observed("a rising schedule was accepted")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = trial.deciding[0]
        asked = [PATCHES + 1] * first + [2] * (3 - first)
        left = slim(host, trial.reducer, keep=asked).counts()
    short = any(issubclass(warning.category, ShortSchedule) for warning in caught)
    rows, wanted = PATCHES, [PATCHES + 1] * first
    for _ in range(first, 3):
        rows = trial.reducer.fewest(rows)
        wanted.append(rows + 1)
    insist(left == tuple(wanted), f"asked for {asked} tokens: left {left}, wanted {wanted}")
    insist(short == (wanted != asked), f"asked for {asked}, left {left}, warned: {short}")


def every_parameter_learns(trial: Trial) -> None:
    """Each parameter that it owns gets a finite gradient in training, and not only zeros."""
    reducer = copy.deepcopy(trial.reducer)
    # A decision on the queries of the last block would change nothing that a head reads.
    model = Trial(reducer, trial.width).model(depth=4).train()
    output: Tensor = model(noise_images())
    output.square().sum().backward()
    for name, parameter in reducer.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            insist(gradient is not None, f"{name} gets no gradient")
            if gradient is not None:
                insist(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite")
                insist(bool(gradient.any()), f"the gradient of {name} is zero")


METHOD_LAWS: tuple[Law[Trial], ...] = (
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


def _of(tokens: Tokens) -> str:
    """How many patches and prefix rows there were."""
    return f"{tokens.patches} patches (prefix {tokens.prefix})"


def _run(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The answer of a model, without gradients."""
    with torch.no_grad():
        output: Tensor = model(images)
    return output


def _traced(trial: Trial) -> list[Tokens]:
    """The tokens after each block of a tiny host."""
    with torch.no_grad():
        return trial.model().trace(noise_images())


def _real(tokens: Tokens, t: Tensor) -> list[Tensor]:
    """Of t (B, n, ...) the entries of each image's real rows."""
    if tokens.alive is None:
        return list(t)
    return [each[real] for each, real in zip(t, tokens.alive, strict=True)]


def _check_same(got: Tokens, wanted: Tokens, who: str) -> None:
    """The same rows, of the same features and sizes."""
    pairs = zip(_real(got, got.cells()), _real(wanted, wanted.cells()), strict=True)
    insist(all(torch.equal(one, other) for one, other in pairs), f"{who}, it chose other rows")
    for what, of in (("prefix", _leading), ("features", _patches), ("sizes", _sizes)):
        insist_close(of(got), of(wanted), 1e-6, f"{who}, {what}")


def _leading(tokens: Tokens) -> Tensor:
    """The prefix rows."""
    return tokens.x[:, : tokens.prefix]


def _patches(tokens: Tokens) -> Tensor:
    """The features of all real patch rows."""
    return torch.cat(_real(tokens, tokens.x[:, tokens.prefix :]))


def _sizes(tokens: Tokens) -> Tensor:
    """The sizes of all real patch rows."""
    return torch.cat(_real(tokens, tokens.sizes()))


def _check_sizes(tokens: Tokens, patches: int, *, joined: bool) -> None:
    """Sizes of at least one that sum to all patches, or to no more than them."""
    for sizes in _real(tokens, tokens.sizes()):
        insist(bool((sizes >= 1).all()), f"a size of {sizes.min().item():g}")
        whole = sizes.sum().item()
        insist(whole <= patches, f"sizes sum to {whole:g} of {patches}")
        insist(not joined or whole == patches, f"sizes of joined rows sum to {whole:g}")


def _check_origin(tokens: Tokens) -> None:
    """Each row is where its own cell leads to; a row of size s is led to by s cells."""
    origin = tokens.origin
    if origin is None:
        raise Observed("the map was lost")
    insist(bool(((origin >= -1) & (origin < tokens.patches)).all()), "it leads to no row")
    back = origin.gather(1, tokens.cells())
    pairs = zip(_real(tokens, back), _real(tokens, tokens.rows()), strict=True)
    insist(all(torch.equal(one, other) for one, other in pairs), "a row's own cell leads elsewhere")
    led = torch.zeros(origin.shape[0], tokens.patches + 1).scatter_add(
        1, origin + 1, torch.ones(origin.shape)
    )[:, 1:]
    sizes = tokens.sizes().float()
    if tokens.alive is not None:
        sizes = sizes * tokens.alive
    insist(torch.equal(led, sizes), "sizes are not the cells that lead there")
