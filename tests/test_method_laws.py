"""The laws of methods, on methods on disk with all their switches, toys, and examples in docs."""

import ast
import functools
import inspect
import re
import shutil
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import patchslim
import patchslim.methods
import toy_methods
from patchslim.errors import NeedsClassToken, UnknownName
from patchslim.methods import Method
from patchslim.methods._method import method_settings
from patchslim.schedules.schedule import Rate
from patchslim.testing import METHOD_LAWS, check_method
from patchslim.testing.law import check_law
from patchslim.testing.method_laws import (
    compiles_whole,
    exports,
    packed_is_padded_is_alone,
    padding_changes_nothing,
)
from patchslim.testing.trial import Trial, noise_images, tiny_host

SLOW = (compiles_whole, exports)
COMPILED_BY_DEFAULT = ("duplicates",)
OF_ADAPTIVE = (padding_changes_nothing, packed_is_padded_is_alone)


SUBJECTS = [*toy_methods.shipped_methods(), *toy_methods.all_toys()]


def slow_cases():
    """Lists the laws that take seconds: by default for an adaptive method.

    `test_compiled_laws.py` compiles and exports a fixed one.
    """
    for subject in SUBJECTS:
        for law in SLOW:
            yield pytest.param(
                *subject.values,
                law,
                id=f"{subject.id}-{law.__name__}",
                marks=[] if subject.id in COMPILED_BY_DEFAULT else [pytest.mark.slow],
            )


@pytest.mark.parametrize("method", SUBJECTS)
def test_the_method_keeps_the_laws(method):
    trial = Trial(method.eval(), 16)  # it decides once for all laws
    for law in METHOD_LAWS:
        has_nothing_to_say = law in OF_ADAPTIVE and not method.adaptive
        if law not in SLOW and not has_nothing_to_say:
            check_law(law, trial, type(method).__name__)


@pytest.mark.parametrize(("method", "law"), list(slow_cases()))
def test_the_method_keeps_a_law_that_takes_seconds(method, law):
    check_law(law, Trial(method.eval(), 16), type(method).__name__)


def test_no_method_is_overlooked():
    files = {path.stem for path in Path(patchslim.methods.__file__).parent.glob("*.py")}
    assert set(patchslim.method_names()) == {name for name in files if not name.startswith("_")}
    assert {"evit", "identity", "random", "tome", "topk"} <= files


MIDDLE = '''
"""`middle`: keeps the patches in the middle of the sequence."""

import torch

from patchslim.methods import Method
from patchslim.tokens.reduction import Keep


class Middle(Method):
    """Keeps a run of rows in the middle."""

    def choose(self, tokens, signals, keep):
        first = (tokens.patches - keep) // 2
        return Keep(tokens.rows()[:, first : first + keep].contiguous())
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Copies the folder of methods, and puts the copy in place of the real one."""
    copied = tmp_path / "methods"
    shutil.copytree(Path(patchslim.methods.__file__).parent, copied)
    monkeypatch.setattr(patchslim.methods, "__path__", [str(copied)])
    yield copied
    for name in ("middle", "broken"):
        sys.modules.pop(f"patchslim.methods.{name}", None)
        if hasattr(patchslim.methods, name):
            delattr(patchslim.methods, name)


def test_a_file_in_the_folder_is_a_method(folder):
    (folder / "middle.py").write_text(MIDDLE)
    assert "middle" in patchslim.method_names()
    host = tiny_host()
    slimmed = patchslim.slim(host, "middle", keep_rate=0.75, at=(0,))
    assert slimmed.trace(noise_images(1))[0].cells().tolist() == [list(range(2, 14))]
    cost = patchslim.macs(host, "middle", keep_rate=0.75, at=(0,))
    assert cost == slimmed.macs()
    trial = Trial(slimmed.method.eval(), 16)
    for law in METHOD_LAWS:
        if law not in SLOW:
            check_law(law, trial, "middle")
    with pytest.raises(UnknownName, match="'middle'"):
        patchslim.slim(host, "midle", keep=0.5)


def test_a_file_without_one_method_says_so(folder):
    (folder / "broken.py").write_text('"""Nothing here."""\n')
    with pytest.raises(UnknownName, match="defines 0 methods"):
        patchslim.find_method("broken")


GUIDE = Path(__file__).resolve().parents[1] / "docs" / "adding-a-method.md"


def example_code():
    """Joins the Python blocks that the guide and the docstring of `Method` show."""
    text = GUIDE.read_text(encoding="utf-8")
    shown = inspect.getdoc(Method).partition("::\n")[2].partition("\nSettings are")[0]
    return "\n".join([*re.findall(r"```python\n(.*?)```", text, re.DOTALL), textwrap.dedent(shown)])


@functools.cache
def examples():
    """Writes the methods that are shown into a module of their own, since they are pickled, too."""
    module = types.ModuleType("methods_of_the_guide")
    sys.modules[module.__name__] = module
    vars(module)["torch"] = torch
    wanted = (ast.Import, ast.ImportFrom, ast.ClassDef)
    tree = ast.parse(example_code())
    tree.body = [node for node in tree.body if isinstance(node, wanted)]
    exec(compile(tree, str(GUIDE), "exec"), vars(module))
    shown = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [vars(module)[name] for name in shown]


@pytest.mark.parametrize("kind", examples(), ids=lambda kind: kind.__name__)
def test_the_methods_that_the_guide_shows_keep_the_laws(kind):
    trial = Trial(kind().eval(), 16)
    for law in METHOD_LAWS:
        if law not in SLOW:
            check_law(law, trial, kind.__name__)


def test_the_guide_shows_methods_of_several_kinds():
    names = {kind.__name__ for kind in examples()}
    assert names == {"KeyNorm", "LongestKeys", "NormMerge", "Patience"}


@torch.no_grad()
def test_a_method_of_your_own_passes_through_untouched():
    mine = toy_methods.Predictor(width=16)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    slimmed = patchslim.slim(tiny_host(), mine, keep_rate=0.7, at=(0, 1))
    slimmed(noise_images())
    assert slimmed.method is mine
    assert method_settings(mine) == {"width": 16}
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())
    assert patchslim.methods._registry.method_name(mine) is None


def test_a_loss_that_would_never_be_called_is_refused():
    with pytest.raises(TypeError, match=r"Steered defines loss, .* Subclass LearnedMethod"):

        class Steered(toy_methods.KeepLongest):
            def loss(self, decisions):
                return None

    class Learned(patchslim.methods.LearnedMethod, toy_methods.KeepLongest):
        def loss(self, decisions):
            return None

    assert Learned().loss([]) is None


@pytest.mark.slow
def test_the_whole_check_of_a_method_of_your_own():
    mine = toy_methods.Predictor(width=24).train()
    check_method(mine, width=24)
    assert mine.training
    assert all(parameter.grad is None for parameter in mine.parameters())


@pytest.mark.parametrize("name", ["evit", "topk"])
def test_methods_that_need_a_class_token_offer_others(name):
    with pytest.raises(NeedsClassToken, match=r"identity, .*random, .*tome"):
        patchslim.slim(tiny_host(readout="average"), name, keep=0.7)
    with pytest.raises(NeedsClassToken, match=r"identity, .*random, .*tome"):
        patchslim.macs(tiny_host(readout="average"), name, keep=0.7)


@torch.no_grad()
@pytest.mark.parametrize("name", ["evit", "topk"])
def test_a_pooling_query_stands_in_for_the_class_token(name):
    """The patches that survive are those to which the host's own pooling attends most."""
    host, x = tiny_host(readout="query"), noise_images()
    slimmed = patchslim.slim(host, name, schedule=Rate(0.5, (2,)))
    survivors = slimmed.trace(x)[-1].cells()[:, :8]
    pool = host.attn_pool
    entering = host.blocks[:2](host.norm_pre(host._pos_embed(host.patch_embed(x))))
    rows = host.norm(entering)
    q = pool.q(pool.latent.expand(3, -1, -1)).unflatten(2, (2, 8)).transpose(1, 2)
    k = pool.kv(rows)[..., :16].unflatten(2, (2, 8)).transpose(1, 2)
    weights = (q @ k.transpose(2, 3) * pool.scale).softmax(dim=3)[:, :, 0].mean(dim=1)
    assert torch.equal(survivors, weights.topk(8, dim=1).indices)


@torch.no_grad()
def test_random_keeps_the_same_places_for_every_image_and_nests_them():
    slimmed = patchslim.slim(tiny_host(), "random", keep=[14, 9, 5])
    traced = [tokens.cells() for tokens in slimmed.trace(noise_images())]
    assert all((cells == cells[0]).all() for cells in traced)
    kept = [set(cells[0].tolist()) for cells in traced]
    assert kept[2] < kept[1] < kept[0]


def test_seeds_of_random_differ():
    scene = Trial(patchslim.find_method("random")(), 16).scene((14, 14))
    kind = patchslim.find_method("random")
    kept = [
        set(Trial(kind(seed=seed), 16).decide(scene, 98).cells()[0].tolist()) for seed in range(8)
    ]
    for i in range(8):
        for j in range(i):
            assert 30 < len(kept[i] & kept[j]) < 68  # 49 are expected of two independent draws
