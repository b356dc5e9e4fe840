"""`patchslim completion`: the scripts that complete commands in a shell, run by real shells."""

import json
import shlex
import shutil
import subprocess

import pytest

from child_process import run_patchslim as run
from patchslim.cli.completion import SHELLS
from patchslim.cli.parser import make_parser
from patchslim.methods._registry import method_names
from patchslim.settings import group_settings
from patchslim.training.config import TrainConfig

needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "patchslim.bash"
    ended = run(path.parent, "completion", "bash")
    assert (ended.code, ended.err) == (0, "")
    path.write_text(ended.out)
    return path


def complete(script, *words):
    """Runs bash, and lists what it offers for the last word of a command line."""
    line = shlex.join(words)
    code = f"""
source {script}
COMP_WORDS=({line})
COMP_CWORD={len(words) - 1}
COMP_LINE={shlex.quote(line)}
COMP_POINT=${{#COMP_LINE}}
complete -p patchslim | grep -o -- '-F [^ ]*' | cut -c4- > function
"$(cat function)" patchslim {shlex.quote(words[-1])} {shlex.quote(words[-2])}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, timeout=30, check=False,
        cwd=script.parent,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@needs_bash
def test_bash_completes_commands(script):
    assert {*make_parser().commands} <= {*complete(script, "patchslim", "")}
    assert complete(script, "patchslim", "me") == ["measure", "methods"]


@needs_bash
def test_bash_completes_every_option_of_a_command(script):
    for name, command in make_parser().commands.items():
        options = {text for action in command._actions for text in action.option_strings}
        assert {*complete(script, "patchslim", name, "-")} == options
    assert complete(script, "patchslim", "train", "--weight") == ["--weights", "--weight-decay"]
    settings = [each.name for group in group_settings(TrainConfig).values() for each in group]
    assert len(settings) == 38


@needs_bash
@pytest.mark.parametrize("command", ["slim", "calibrate", "train", "measure", "macs"])
def test_bash_completes_methods(script, command):
    assert complete(script, "patchslim", command, "--method", "") == method_names()
    assert complete(script, "patchslim", command, "--method", "ev") == ["evit", "evo"]


@needs_bash
def test_bash_completes_choices(script):
    assert complete(script, "patchslim", "slim", "--tail", "") == ["exact", "full"]
    assert complete(script, "patchslim", "train", "--recipe", "l") == ["levit"]
    assert complete(script, "patchslim", "completion", "") == list(SHELLS)


@needs_bash
def test_bash_completes_files_and_folders(script):
    (script.parent / "weights.safetensors").write_text("")
    (script.parent / "wide").mkdir()
    files = complete(script, "patchslim", "slim", "--weights", "w")
    assert {each.rstrip("/") for each in files} == {"weights.safetensors", "wide"}
    (folder,) = complete(script, "patchslim", "train", "--out", "w")
    assert folder.rstrip("/") == "wide"
    models = complete(script, "patchslim", "measure", "wi")
    assert [each.rstrip("/") for each in models] == ["wide"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_with_every_option(tmp_path, shell):
    ended = run(tmp_path, "completion", shell, "--json")
    data = json.loads(ended.out)
    assert (ended.code, ended.err, data["shell"]) == (0, "", shell)
    for action in make_parser().all_actions():
        for option in action.option_strings:
            assert option.lstrip("-") in data["script"]
    assert all(name in data["script"] for name in method_names())
    if shutil.which(shell):
        path = tmp_path / "script"
        path.write_text(data["script"])
        checked = subprocess.run(
            [shell, "-n", str(path)], capture_output=True, text=True, timeout=30, check=False
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_another_shell_is_refused_with_those_that_are_known(tmp_path):
    ended = run(tmp_path, "completion", "csh")
    assert (ended.code, ended.out) == (2, "")
    assert "invalid choice: 'csh'" in ended.err
    assert "bash, zsh, fish" in ended.err


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish_completes_commands_methods_and_options(tmp_path):
    (tmp_path / "script").write_text(run(tmp_path, "completion", "fish").out)

    def offers(line):
        code = f"source {tmp_path / 'script'}; complete -C {shlex.quote(line)}"
        done = subprocess.run(
            ["fish", "--no-config", "-c", code], capture_output=True, text=True, timeout=30,
            check=True,
        )  # fmt: skip
        return [each.partition("\t")[0] for each in done.stdout.splitlines() if each.strip()]

    assert {*offers("patchslim ")} == {*make_parser().commands}
    assert offers("patchslim slim digits --method ev") == ["evit", "evo"]
    assert {*offers("patchslim train --weight")} == {"--weights", "--weight-decay"}
