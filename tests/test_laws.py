"""The laws catch faults: each is broken once on purpose, and the check names it."""

import dataclasses
import re
from typing import ClassVar

import pytest
import torch

import patchslim
from patchslim.errors import BadSetting, BrokenLaw, PatchslimError, UnsupportedModel
from patchslim.hosts.timm_vit import TimmVit
from patchslim.methods.similarity import Similarity
from patchslim.testing import FAMILY_LAWS, METHOD_LAWS, check_adapter, check_method
from patchslim.testing.adapter_laws import AdapterTrial
from patchslim.testing.law import check_law
from patchslim.testing.trial import Trial, tiny_host
from patchslim.tokens.merging import Merge
from patchslim.tokens.reduction import Fuse, Keep
from toy_methods import KeepLongest, KeepLongestOnQueries, MergeShortest, Predictor, row_norms


class OneTooFew(KeepLongest):
    def choose(self, tokens, signals, keep):
        return super().choose(tokens, signals, max(keep - 1, 1))


class LooksInSecret(Similarity):
    """Compares features, but does not say so."""

    def __init__(self):
        super().__init__(threshold=0.05, floor=0.1, weight="size")
        self.reads = ("k",)


class TooModest(KeepLongest):
    def fewest(self, patches):
        return 0


class Moving(Keep):
    def move(self, t, *, weight=None, total=None, prefix=0):
        moved = super().move(t, weight=weight, prefix=prefix)
        return moved.roll(1, dims=1) if prefix else moved


class PrefixMoves(KeepLongest):
    def choose(self, tokens, signals, keep):
        return Moving(super().choose(tokens, signals, keep).kept)


class KeepsOneTwice(KeepLongest):
    def choose(self, tokens, signals, keep):
        kept = super().choose(tokens, signals, keep).kept
        return Keep(torch.cat([kept[:, :-1], kept[:, :1]], dim=1))


class CountsOneTwice(MergeShortest):
    def choose(self, tokens, signals, keep):
        merge = super().choose(tokens, signals, keep)
        return Merge(merge.kept, gone=torch.cat([merge.gone] * 2, 1), into=merge.into.repeat(1, 2))


class Astray(Keep):
    def remap(self, rows):
        return super().remap(rows).flip(1)


class LosesTheMap(KeepLongest):
    def choose(self, tokens, signals, keep):
        return Astray(super().choose(tokens, signals, keep).kept)


class Fickle(KeepLongest):
    def choose(self, tokens, signals, keep):
        return Keep(torch.rand_like(row_norms(tokens)).topk(keep, dim=1).indices)


class Sociable(KeepLongest):
    def choose(self, tokens, signals, keep):
        length = row_norms(tokens)
        return Keep((length - length.mean(dim=0)).abs().topk(keep, dim=1).indices)


class Overflows(KeepLongest):
    def choose(self, tokens, signals, keep):
        kept = row_norms(tokens).topk(keep, dim=1).indices
        others = torch.ones_like(row_norms(tokens)).scatter(1, kept[:, :-1], 0.0)
        return Fuse(kept[:, :-1], share=others * 60_000)


class Secretive(KeepLongest):
    def __init__(self, *, power=2.0):
        super().__init__()
        self.exponent = power


class Forgetful(KeepLongest):
    def __init__(self, *, power=2.0):
        super().__init__()
        self.power = power + 1


class Undeclared(KeepLongest):
    def choose(self, tokens, signals, keep):
        return Keep(signals.class_attention().topk(keep, dim=1).indices)


class Thrifty(KeepLongestOnQueries):
    def choose(self, tokens, signals, keep):
        keys = signals.k[:, :, signals.prefix :]
        return Keep((keys @ keys.transpose(2, 3)).sum(dim=(1, 3)).topk(keep, dim=1).indices)


class Deaf(Predictor):
    def choose(self, tokens, signals, keep):
        return Keep(super().choose(tokens, signals, keep).represent(tokens.rows())[:, :keep])


class Closed(KeepLongest):
    def __init__(self):
        super().__init__()
        self.rank = lambda t: t

    def choose(self, tokens, signals, keep):
        return Keep(self.rank(row_norms(tokens)).topk(keep, dim=1).indices)


class Peeking(KeepLongest):
    def choose(self, tokens, signals, keep):
        length = row_norms(tokens)
        return Keep((length if float(length.sum()) > 0 else -length).topk(keep, dim=1).indices)


class FixedBatch(KeepLongest):
    def choose(self, tokens, signals, keep):
        length = row_norms(tokens)
        ranked = torch.stack([each.topk(keep).indices for each in length.unbind(0)])
        return Keep(ranked)


class Unfit(KeepLongest):
    """Takes no part of a host without a class token, yet says that it needs none."""

    def choose(self, tokens, signals, keep):
        if not tokens.prefix:
            raise ValueError("no prefix")
        return super().choose(tokens, signals, keep)


class Bare(KeepLongest):
    """Returns the rows instead of a decision."""

    def choose(self, tokens, signals, keep):
        return super().choose(tokens, signals, keep).kept


class CountsPrefix(KeepLongest):
    """Counts rows from the class token on."""

    def choose(self, tokens, signals, keep):
        return Keep(tokens.x.norm(dim=2).topk(keep, dim=1).indices)


METHODS = [
    (Bare, "chooses_among_the_patches"),
    (CountsPrefix, "chooses_among_the_patches"),
    (OneTooFew, "leaves_exactly_the_scheduled_count"),
    (TooModest, "leaves_exactly_the_scheduled_count"),
    (LooksInSecret, "packed_is_padded_is_alone"),
    (PrefixMoves, "prefix_rows_come_first_and_unchanged"),
    (KeepsOneTwice, "rows_that_stay_are_distinct"),
    (CountsOneTwice, "sizes_add_up"),
    (LosesTheMap, "the_map_back_to_the_pixels_is_right"),
    (Fickle, "chooses_the_same_every_time"),
    (Sociable, "an_image_does_not_depend_on_its_batch"),
    (Overflows, "half_precision_stays_finite"),
    (Secretive, "settings_make_an_equal_method"),
    (Forgetful, "settings_make_an_equal_method"),
    (Undeclared, "chooses_among_the_patches"),
    (Undeclared, "says_whether_it_needs_a_class_token"),
    (Unfit, "says_whether_it_needs_a_class_token"),
    (Thrifty, "macs_are_what_it_spends"),
    (Deaf, "every_parameter_learns"),
    (Closed, "pickles"),
    (Peeking, "compiles_whole"),
    (FixedBatch, "exports"),
]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_that_breaks_a_law_is_caught(kind, name):
    law = {law.__name__: law for law in METHOD_LAWS}[name]
    with pytest.raises(BrokenLaw, match=name) as caught:
        check_law(law, Trial(kind().eval(), 16), kind.__name__)
    assert caught.value.law == name
    assert isinstance(caught.value, PatchslimError)
    assert kind.__name__ in str(caught.value)
    assert "Observed: " in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        (Bare, "choose() returned a Tensor; return a Reduction, such as Keep(rows)"),
        (CountsPrefix, "Cut these off: tokens.x[:, tokens.prefix :]"),
        (Undeclared, "Set needs_class_token = True."),
        (Unfit, "choose() raised ValueError: no prefix (test_laws.py, line"),
    ],
)
def test_a_choice_that_cannot_be_used_is_told_with_the_cure(kind, cure):
    with pytest.raises(BrokenLaw, match=re.escape(cure)):
        check_method(kind())


def test_a_class_and_a_half_made_method_are_told_from_a_method():
    class Hasty(KeepLongest):
        def __init__(self):
            self.power = 2

    with pytest.raises(BadSetting, match=r"OneTooFew is a class. Give an instance: OneTooFew\(\)"):
        check_method(OneTooFew)
    with pytest.raises(BadSetting, match=r"Hasty does not call super\(\).__init__\(\) first"):
        patchslim.slim(tiny_host(), Hasty(), r=2)
    with pytest.raises(BadSetting, match=r"Approximate is a class. Give an instance"):
        check_adapter(tiny_host(), Approximate)


def test_an_adapter_for_other_hosts_is_refused_with_the_classes():
    class Zebras(TimmVit):
        host_classes = frozenset({"zoo.Zebra"})

    with pytest.raises(UnsupportedModel, match=r"Zebras does not serve timm\..*host_classes"):
        patchslim.slim(tiny_host(), "tome", r=2, adapter=Zebras())


def test_the_check_stops_at_the_first_broken_law():
    with pytest.raises(BrokenLaw, match="OneTooFew breaks the law leaves_exactly"):
        check_method(OneTooFew())


class Approximate(TimmVit):
    def mix(self, host, index, queries, attended):
        return super().mix(host, index, queries, attended * 1.001)


class Stranger(TimmVit):
    host_classes: ClassVar = frozenset({"zoo.Zebra"})


class Forgets(TimmVit):
    """Does not say that there is a class token."""

    def describe(self, host):
        facts = super().describe(host)
        return dataclasses.replace(facts, prefix=0, has_class_token=False)


class Miscounts(TimmVit):
    def shape(self, host, image_size=None):
        return dataclasses.replace(super().shape(host, image_size), grid=(4, 5))


class Swaps(TimmVit):
    def project(self, host, index, tokens, part):
        return super().project(host, index, tokens, part)[:: -1 if part == "kv" else 1]


class Absolute(TimmVit):
    """Uses a token's place in the sequence, not its grid cell."""

    def feed(self, host, index, x):
        place = torch.outer(torch.linspace(0, 1, x.shape[1]), torch.linspace(-1, 1, x.shape[2]))
        return super().feed(host, index, x + place if index == 0 else x)


class Pickier(TimmVit):
    def head(self, host, tokens, options):
        return super().head(host, tokens, options)[:, :-1]


class Narrow(TimmVit):
    """Says that the head reads one row, of a head that reads them all."""

    def describe(self, host):
        return dataclasses.replace(super().describe(host), rows_read=1)


class Cheap(TimmVit):
    def shape(self, host, image_size=None):
        shape = super().shape(host, image_size)
        return dataclasses.replace(shape, embed=shape.embed // 2)


class OneShort(TimmVit):
    """Forgets one multiply-add for each channel of a row, in one block: a weighted sum."""

    def shape(self, host, image_size=None):
        shape = super().shape(host, image_size)
        *others, last = shape.blocks
        last = dataclasses.replace(last, out=last.out - last.width)
        return dataclasses.replace(shape, blocks=(*others, last))


class Rowwise(TimmVit):
    """Takes the mean of the rows, whatever they stand for."""

    def head(self, host, tokens, options):
        return super().head(host, dataclasses.replace(tokens, size=None), options)


class CountsPadding(TimmVit):
    """Takes the mean of all rows, those of padding, too."""

    def head(self, host, tokens, options):
        return super().head(host, dataclasses.replace(tokens, alive=None), options)


class Untidy(TimmVit):
    def embed(self, host, images, options):
        host.seen = len(images)
        return super().embed(host, images, options)


class Shared(TimmVit):
    """Keeps what a block needs in the adapter, where other threads overwrite it."""

    last: ClassVar[dict] = {}

    def project(self, host, index, tokens, part):
        self.last["x"] = tokens.x
        for _ in range(200):
            torch.ones(8).sum()
        return super().project(host, index, tokens.with_x(self.last["x"]), part)


class Amnesiac(TimmVit):
    def recipe(self, host):
        return {"architecture": "test_vit", "args": {}, "num_classes": 5, "cfg": {}}


FAMILIES = [
    (Approximate, "keeping_everything_equals_the_host", "class"),
    (Stranger, "the_host_is_of_its_classes", "class"),
    (Forgets, "the_shape_says_which_rows_enter", "class"),
    (Miscounts, "the_shape_says_which_rows_enter", "class"),
    (Swaps, "parts_are_columns_of_the_whole", "class"),
    (Absolute, "rows_may_stand_in_any_order", "class"),
    (Pickier, "a_reduced_answer_has_the_shape_of_the_hosts", "class"),
    (Narrow, "the_exact_tail_gives_the_same_answer", "average"),
    (Rowwise, "the_head_counts_patches_and_not_rows", "average"),
    (Rowwise, "the_head_counts_patches_and_not_rows", "query"),
    (CountsPadding, "the_head_counts_patches_and_not_rows", "average"),
    (CountsPadding, "the_head_counts_patches_and_not_rows", "query"),
    (Cheap, "macs_are_what_it_spends", "class"),
    (OneShort, "macs_are_what_it_spends", "class"),
    (Untidy, "the_host_stays_unchanged", "class"),
    (Amnesiac, "a_recipe_rebuilds_the_architecture", "class"),
]


@pytest.mark.parametrize(("kind", "name", "readout"), FAMILIES)
def test_a_family_that_breaks_a_law_is_caught(kind, name, readout):
    law = {law.__name__: law for law in FAMILY_LAWS}[name]
    with pytest.raises(BrokenLaw, match=name) as caught:
        check_law(law, AdapterTrial(tiny_host(readout=readout), kind()), kind.__name__)
    assert caught.value.law == name


@pytest.mark.parametrize("what", ["scales", "dropouts", "strides"])
@pytest.mark.parametrize("given", [2, 4])
def test_facts_of_another_number_of_blocks_are_refused_with_both_numbers(what, given):
    class Uneven(TimmVit):
        def describe(self, host):
            return dataclasses.replace(super().describe(host), **{what: (1,) * given})

    told = rf"Uneven\.describe\(\) gives {given} {what} for the 3 blocks"
    for plan in (patchslim.slim, patchslim.macs):
        with pytest.raises(BrokenLaw, match=told):
            plan(tiny_host(), "tome", r=2, adapter=Uneven())


def test_a_family_that_shares_state_between_threads_is_caught():
    law = {law.__name__: law for law in FAMILY_LAWS}["two_threads_get_the_answers_of_one"]

    def often():
        for _ in range(50):
            check_law(law, AdapterTrial(tiny_host(), Shared()), "Shared")

    with pytest.raises(BrokenLaw, match="two_threads"):
        often()


@pytest.mark.parametrize("readout", ["class", "average", "query"])
def test_the_check_of_a_family_passes_and_leaves_the_host_in_its_mode(readout):
    host = tiny_host(readout=readout).train()
    host.blocks[1].eval()
    check_adapter(host)
    assert host.training
    assert not host.blocks[1].training


def test_the_check_of_a_family_takes_an_adapter_of_your_own():
    with pytest.raises(BrokenLaw, match="Approximate breaks the law keeping_everything"):
        check_adapter(tiny_host(), Approximate())
    assert patchslim.slim(tiny_host(), "tome", r=2, adapter=TimmVit()).counts() == (15, 13, 11)
