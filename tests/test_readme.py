"""What the README says is true: its code runs, its commands parse, its numbers are those of the results."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import byte_tokenizer, tiny

from benchmarks.readme import filled
from svdexpert import skills, worlds
from svdexpert.worlds import SPLITS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BASE = "Qwen/Qwen3-0.6B"  # what the README names; a random model of the same kind stands in for it here


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands() -> list[list[str]]:
    joined = (block.replace("\\\n", " ") for block in blocks("bash"))
    lines = [line for block in joined for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


def indented() -> list[list[str]]:
    """Return the commands in indented blocks, which need data or take long: they are parsed, and not run."""
    joined = README.replace("\\\n", " ")
    lines = re.findall(r"^    (svdexpert .+)$", joined, flags=re.M)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "Qwen3-0.6B"
    tiny("qwen3", hidden_size=128, intermediate_size=160, head_dim=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def run_python(folder: Path, stand_in: Path) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block.replace(BASE, str(stand_in)), "README.md", "exec"), namespace)


def test_the_code_runs(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 4
    run_python(tmp_path, stand_in)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_its_own_skill_is_sound_and_its_config_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = (one for one in blocks("python") if "MOVE =" in one)
    (tmp_path / "dose.py").write_text(block)
    skill, splits = skills.load(str(tmp_path / "dose.py")), {}
    for split in SPLITS:
        cases = skill.cases(worlds.load("town"), split, 12)
        splits[split] = {one.cluster for one in cases}
        assert [one.positive for one in cases] == [True, False] * 6
        for case in cases:
            assert skill.verify(case, case.gold[0]).score == 1
            assert [skill.verify(case, one.reply).error for one in case.bad] == [one.error for one in case.bad]
        for policy in skill.DEGENERATE.values():
            assert sum(skill.verify(case, policy(case)).score for case in cases) <= 0
    assert not splits["train"] & splits["heldout"]
    config = re.search(r"    # dose.yaml.*?\n\n", README, flags=re.S)
    assert config is not None
    (tmp_path / "dose.yaml").write_text(textwrap.dedent(config.group()))
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "svdexpert.cli", "train", "--config", "dose.yaml", "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "skill: dose.py" in done.stdout, done.stderr


def test_the_first_code_is_short() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 10


@pytest.mark.parametrize("command", [*commands(), *indented()], ids=" ".join)
def test_the_commands_parse(command: list[str]) -> None:
    assert command[0] == "svdexpert"
    done = subprocess.run(
        [sys.executable, "-m", "svdexpert.cli", *command[1:], "--print_config"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^    make (\w+)", README, flags=re.M))
    assert targets == {"demo", "test"}
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_the_tree_is_the_tree() -> None:
    tree = README[README.index("## The tree") :]
    named = set(re.findall(r"^      (\w+\.py) ", tree, flags=re.M))
    assert named == {path.name for path in (ROOT / "svdexpert").glob("*.py")}


def test_the_numbers_are_those_of_the_results() -> None:
    assert filled(README) == README, "run `python -m benchmarks.readme`"


@pytest.mark.slow
def test_the_commands_run(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    run_python(tmp_path, stand_in)
    for name in ("lora", "merged"):
        (tmp_path / name).rename(tmp_path / f"{name}-from-python")
    for command in commands():
        here = [str(stand_in) if word == BASE else word for word in command]
        done = subprocess.run([sys.executable, "-m", "svdexpert.cli", *here[1:]], capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(here)}\n{done.stderr}"
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("module", ["speed", "attacks", "readme"])  # the others take hours
def test_the_benchmarks_run(module: str, tmp_path: Path) -> None:
    options = {"speed": ["--quick"], "attacks": [f"--output={tmp_path / 'attacks.json'}"], "readme": []}[module]
    before = README
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=900)
    assert (ROOT / "README.md").read_text() == before
