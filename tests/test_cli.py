"""The command line, run as a user runs it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import tiny

from svdexpert import Expert, Library, SpectralModel, cli, dispatch
from svdexpert.conversation import invocation_of
from svdexpert.dispatch.fixed import Fixed
from svdexpert.evaluate import SkillResult

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `svdexpert` with arguments and returns what it printed."""

    def call(*arguments: object, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["svdexpert", *map(str, arguments)])
        if fails:
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 1
            return capsys.readouterr().err
        cli.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def base(folder_of: Callable[..., Path]) -> Path:
    return folder_of()


@pytest.fixture
def library(base: Path, tmp_path: Path) -> Path:
    model = SpectralModel.from_pretrained(base, k=8, first_layer=2, progress=False)
    library = Library(tmp_path / "experts")
    for seed, name in enumerate(("ask", "doubt")):
        library.add(name, Expert.random(model.basis, std=0.3, seed=seed))
    return library.path


def test_help_answers_at_once() -> None:
    script = (
        "import sys, time; start = time.perf_counter()\n"
        "from svdexpert.cli import main\n"
        "sys.argv = ['svdexpert', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'matplotlib', 'scipy', 'numpy', 'datasets'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1
    assert done.stdout.endswith("[]\n")
    for verb in ("decompose", "inspect", "generate", "export", "demo"):
        assert verb in done.stdout


def test_an_interrupt_ends_with_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def verb() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["svdexpert"])
    with pytest.raises(SystemExit) as stop:
        cli.run_command(verb, "svdexpert")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "svdexpert: interrupted; nothing half-written is left\n"


@pytest.mark.parametrize("verb", ["decompose", "inspect", "generate", "export", "demo"])
def test_every_verb_prints_its_configuration(verb: str) -> None:
    command = [sys.executable, "-m", "svdexpert.cli", verb, "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert isinstance(yaml.safe_load(done.stdout), dict)


def test_decompose(run: Run, base: Path) -> None:
    printed = run("decompose", base, "--k", 4, "--first_layer", 0)
    assert "21 matrices, 84 numbers an expert" in printed
    assert "self_attn.q_proj" in printed
    assert "14 matrices, 384 numbers" in run("decompose", base, "--k", "full")
    texts = base / "calibration.txt"
    texts.write_text("some text\nand more of it\n")
    printed = run("decompose", base, "--k", 4, "--support", "sensitivity", "--calibration", texts)
    assert "support sensitivity" in printed


def test_decompose_reads_a_config(run: Run, base: Path, tmp_path: Path) -> None:
    config = tmp_path / "decompose.yaml"
    config.write_text(yaml.safe_dump({"model": str(base), "k": 3, "targets": ["*.mlp.*"]}))
    assert "6 matrices, 18 numbers" in run("decompose", "--config", config)


def test_inspect_a_model_without_reading_its_weights(run: Run, base: Path) -> None:
    for file in base.glob("*.safetensors"):
        file.unlink()
    printed = run("inspect", base)
    assert "3 layers, 21 adaptable matrices" in printed
    assert "by default experts act from layer 1 on" in printed
    tiny("mixtral").config.save_pretrained(base)
    assert "fused expert tensor" in run("inspect", base)


def test_inspect_an_expert_and_a_library(run: Run, library: Path, tmp_path: Path) -> None:
    printed = run("inspect", library / "ask", "--plot", tmp_path / "ask.png")
    assert "56 offsets (diag)" in printed
    assert "model.layers.2.mlp.down_proj" in printed
    assert "picture in" in printed
    printed = run("inspect", library, "--plot", tmp_path / "conflict.png")
    assert "2 experts" in printed
    assert "+1.00 (0.00)" in printed
    for picture in ("ask.png", "conflict.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_generate_several_mixtures_in_one_batch(run: Run, base: Path, library: Path) -> None:
    mix = json.dumps([{}, {"ask": 1.0}, {"ask": 0.7, "doubt": 0.3}])
    printed = run("generate", base, "hello", "--experts", library, "--mix", mix, "--max_new_tokens", 8)
    model = SpectralModel.from_pretrained(base, k=8, first_layer=2, progress=False)
    replies = model.generate(
        ["hello"] * 3, json.loads(mix), library=Library(library), max_new_tokens=8, do_sample=False
    )
    for mixture, reply in zip(("base", "ask 1", "ask 0.7, doubt 0.3"), replies, strict=True):
        assert mixture in printed
        assert reply.strip() in printed
    assert "ask 1" in run("generate", base, "hello", "--experts", library / "ask", "--max_new_tokens", 4)
    assert "base" in run("generate", base, "hello", "--chat", "--temperature", 1, "--max_new_tokens", 4)


def test_text_is_shown_as_it_is(run: Run, library: Path) -> None:
    """Names and replies may look like rich's markup."""
    expert = dataclasses.replace(Library(library)["ask"], skill="ask [/x] [bold]", objective="sft [/INST]")
    Library(library).add("ask", expert, overwrite=True)
    assert "ask [/x] [bold]" in run("inspect", library)
    assert "ask [/x] [bold]" in run("inspect", library / "ask")


def test_export(run: Run, base: Path, library: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    printed = run("export", base, library, out, "--mix", "{ask: 0.7, doubt: 0.3}")
    assert "LoRA of rank 8, 7 modules, retained energy 1.000000" in printed
    assert "keep vLLM's rules" in printed
    assert (out / "adapter_model.safetensors").is_file()
    assert "merged" in run("export", base, library / "ask", tmp_path / "merged", "--form", "merged")
    printed = run("export", base, library / "ask", out, "--overwrite", "--no_check")
    assert "keep vLLM's rules" not in printed
    assert not list(tmp_path.rglob("*.bin"))


def test_mistakes_end_with_a_message(run: Run, base: Path, library: Path, tmp_path: Path) -> None:
    assert "k <= 16" in run("decompose", base, "--k", 99, fails=True)
    assert "Did you mean 'ask'" in run("export", base, library, tmp_path / "x", "--mix", "{aks: 1}", fails=True)
    assert "say which with --mix" in run("export", base, library, tmp_path / "x", fails=True)
    assert "say which with --mix" in run("generate", base, "hi", "--experts", library, fails=True)
    assert "end in .png" in run("inspect", library, "--plot", tmp_path / "x.xyz", fails=True)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    assert "not a causal language model" in run("inspect", tmp_path / "odd", fails=True)
    assert "--rank is for LoRA" in run(
        "export", base, library / "ask", tmp_path / "x", "--form", "merged", "--rank", 8, fails=True
    )
    assert "nothing to export" in run("export", base, library, tmp_path / "x", "--mix", "{}", fails=True)
    assert "empty list" in run("generate", base, "hi", "--experts", library, "--mix", "[]", fails=True)
    assert "--experts FOLDER" in run("generate", base, "hi", "--mix", "{ask: 1}", fails=True)
    assert "is not a folder" in run("inspect", "./nowhere", fails=True)
    assert "cannot be loaded" in run("decompose", base, "--dtype", "float99", fails=True)
    export = ("export", base, library / "ask", base, "--form", "merged")
    assert "is the base itself" in run(*export, fails=True)
    busy = tmp_path / "busy"
    tiny("llama", seed=1).save_pretrained(busy)  # an unrelated checkpoint
    export = ("export", base, library / "ask", busy, "--form", "merged")
    assert "or pass --overwrite" in run(*export, fails=True)
    assert "is not replaced" in run(*export, "--overwrite", fails=True)
    export = ("export", base, library / "ask", base, "--form", "merged")
    assert "is the base itself" in run(*export, "--overwrite", fails=True)
    other = tmp_path / "gpt2"
    tiny("gpt2").save_pretrained(other)
    assert f"made for {base}" in run("generate", other, "hi", "--experts", library / "ask", fails=True)
    assert "neither an expert, nor a library" in run("inspect", tmp_path, fails=True)
    assert "this is neither" in run("inspect", base, "--plot", tmp_path / "x.png", fails=True)
    told = run("generate", base, "hi", "--experts", tmp_path / "none", fails=True)
    assert "does not exist; experts are folders" in told
    assert "svdexpert train makes them" in told
    assert "nofile.json cannot be read (No such file" in run("chat", "--tools", "nofile.json", fails=True)
    assert "give one of them" in run(
        "generate", base, "hi", "--experts", library, "--mix", "{}", "--dispatcher", "any", fails=True
    )
    assert "add --chat" in run("generate", base, "hi", "--experts", library, "--dispatcher", "any", fails=True)
    assert "add --dispatcher FILE" in run("generate", base, "hi", "--why", fails=True)
    assert "no/such-model" in run("decompose", "no/such-model", fails=True)
    assert not (tmp_path / "x").exists()


def test_knowing_and_doing_are_measured_drawn_and_kept(
    run: Run, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, out = folder_of(max_position_embeddings=4096), tmp_path / "bench"
    said = run("bench", "knowing-doing", "--model", base, "--n", 4, "--families", "[clarify, call]", "--out", out)
    assert "clarify" in said
    assert "AUC of a bag of words" in said
    kept = json.loads((out / "knowing_doing.json").read_text())
    assert (kept["world"], kept["split"], kept["n"]) == ("town", "heldout", 4)
    results = [SkillResult.from_json(one) for one in kept["results"]]
    assert [(one.skill, len(one.rows), one.figures["doing"].n) for one in results] == [
        ("clarify", 4, 2),
        ("call", 4, 2),
    ]
    assert (out / "knowing_doing.png").read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_on_few_real_dialogues_leaves_out_what_needs_many(
    run: Run, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    base, data = folder_of(max_position_embeddings=8192), Path(__file__).parent / "fixtures/sgd_compact"
    said = run(
        "bench", "knowing-doing", "--model", base, "--n", 2, "--families", "[disagree]", "--world", "sgd",
        "--data", data, "--split", "train", "--out", tmp_path / "bench",
    )  # fmt: skip
    assert "the user's claims were inserted" in said
    assert "bag of words" not in said
    template = tmp_path / "latin.jinja"
    template.write_bytes(b"\xe9")
    told = run("bench", "knowing-doing", "--model", base, "--n", 2, "--chat_template", template, fails=True)
    assert "is no text in UTF-8" in told
    told = run("bench", "knowing-doing", "--model", base, "--n", 3, fails=True)
    assert "even number" in told


def test_another_basis_than_that_of_frozen_experts_is_refused(run: Run, base: Path, library: Path) -> None:
    words = ["train", "clarify", "--model", base, "--against", library, "--out", library.parent / "run"]
    assert "--k is 16, but the experts" in run(*words, "--k", 16, fails=True)
    assert "--first_layer is 0, but" in run(*words, "--first_layer", 0, fails=True)
    assert not (library.parent / "run").exists()


def test_a_trained_expert_without_intervals_is_shown() -> None:
    assert cli._scores({"doing": [0.5, 0.25, 0.75], "n": 2}) == "doing 0.50 [0.25, 0.75]"
    assert cli._scores({"doing": [1.0, None, None]}) == "doing 1.00 [?, ?]"
    assert cli._scores({}) == "not scored"


@pytest.fixture
def skilled(tmp_path: Path) -> Path:
    """Return experts for harbor, named after skills; they hardly change it."""
    model = SpectralModel.from_pretrained("harbor", progress=False)
    library = Library(tmp_path / "skilled")
    for seed, name in enumerate(("clarify", "disagree", "call")):
        expert = Expert.random(model.basis, std=0.01, seed=seed)
        library.add(name, dataclasses.replace(expert, invocation=invocation_of(model)))
    return library.path


def test_a_dispatcher_is_fitted_measured_and_talked_with(
    run: Run, skilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, log = tmp_path / "router.safetensors", tmp_path / "log.jsonl"
    fit = ("dispatch", "fit", "--experts", skilled, "--out", router, "--settings.strength", 1.5)
    said = run(*fit, "--n", 24, "--validation", 12)
    assert "router for call, clarify, disagree" in said
    assert "right in" in said
    assert "cases that its settings are chosen on" in said
    shown = run("inspect", router)
    for words in ("router", "harbor", "call, clarify, disagree", "accuracy", "calibration error", "clarify 1.5"):
        assert words in shown
    said = run("dispatch", "eval", router, "--experts", skilled, "--n", 20, "--log", log)
    assert "should speak" in said
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert 90 < len(rows) <= 100  # 20 cases and 10 knowing questions a skill, and replies of functions
    assert {"wanted", "weights", "confidence", "because", "abstained"} <= rows[0].keys()
    own = tmp_path / "own.jsonl"
    lines = [{"messages": row["messages"], "experts": row["wanted"]} for row in rows]
    own.write_text("\n".join(map(json.dumps, lines)))
    assert "right in" in run("dispatch", "eval", router, "--experts", skilled, "--examples", own)
    said = run(*fit, "--examples", own)
    assert re.search(r"n \d+, accuracy [\d.]+, calibration error [\d.]+", said)
    assert "cases that its settings are chosen on" in said
    said = run("generate", "harbor", "Hello.", "--chat", "--experts", skilled, "--dispatcher", router, "--why")
    assert "read from the prompt's last state" in said
    typed = iter(["Book me a table.", "/why", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda self, prompt: next(typed))
    history = tmp_path / "talk.json"
    said = run("chat", "--experts", skilled, "--dispatcher", router, "--history", history)
    assert "read from the prompt's last state" in said
    assert [one["role"] for one in json.loads(history.read_text())["messages"]] == ["user", "assistant"]


def test_mistakes_with_dispatchers_end_with_a_message(run: Run, base: Path, library: Path, tmp_path: Path) -> None:
    fit = ["dispatch", "fit", "--experts", library, "--model", base, "--out", tmp_path / "made"]
    assert "None of the experts (ask, doubt) is named after a skill" in run(*fit, fails=True)
    assert "Did you mean 'router'" in run(*fit, "--strategy", "ruoter", fails=True)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"messages": [{"role": "user", "content": "far too long " * 999}], "experts": ["ask"]}))
    assert "examples are too long: their last turn alone" in run(*fit, "--examples", own, fails=True)
    assert "wants 'call', which the library lacks" in run(*fit, "--skills", "call", "--n", 4, fails=True)
    tools = tmp_path / "tools.json"
    tools.write_text("{")
    assert "is no JSON" in run("chat", "--model", base, "--tools", tools, fails=True)
    measured = ["dispatch", "eval", "--experts", library, "--model", base]
    assert "is no dispatcher" in run(*measured, tools, fails=True)
    assert f"{library} is a folder" in run(*measured, library, fails=True)
    assert "'pears'" in run(*fit, "--settings.pears", 3, fails=True)
    own.write_text('{"messages": [{"role": "user", "content": "hi"}], "experts": ["aks"]}\n')
    for command in ([*measured, saved(Fixed({"ask": 1.0}), tmp_path)], fit):
        told = run(*command, "--examples", own, fails=True)
        assert "wants 'aks', which the library lacks. Did you mean 'ask'" in told
    assert "with --experts FOLDER" in run("dispatch", "fit", fails=True)
    assert "with --experts FOLDER" in run("chat", "--dispatcher", tools, fails=True)
    assert "add --dispatcher FILE" in run("chat", "--in_turn", "ask", "--experts", library, fails=True)
    assert "add --dispatcher FILE" in run("chat", "--strategy", "mine.py", "--experts", library, fails=True)
    assert not (tmp_path / "made").exists()


def saved(dispatcher: Fixed, folder: Path) -> Path:
    return dispatch.save_dispatcher(dispatcher, folder / "dispatcher.safetensors")


class Mine(Fixed):
    """A dispatcher of a strategy of one's own."""

    strategy = "mine.py"


def test_inspect_a_dispatcher_of_ones_own(run: Run, tmp_path: Path) -> None:
    shown = run("inspect", saved(Fixed({"ask": 0.5}, "[told]"), tmp_path))
    assert "ask 0.5" in shown
    assert "[told]" in shown
    file = saved(Mine({"ask": 0.5}, "[told]"), tmp_path)
    assert "whose code would run here" in run("inspect", file, fails=True)
    (tmp_path / "mine.py").write_text("from svdexpert.dispatch.fixed import fit, restored\n")
    assert "[told]" in run("inspect", file, "--strategy", tmp_path / "mine.py")


def test_what_cannot_be_written_is_told_before_any_work(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = "is a folder: give the path of a file"
    assert folder in run("dispatch", "fit", "--experts", "nowhere", "--out", tmp_path, fails=True)
    assert folder in run("chat", "--history", tmp_path, fails=True)
    assert folder in run("inspect", "nowhere", "--plot", tmp_path, fails=True)
    assert "is no saved conversation" in run("chat", "--history", file, fails=True)
    below = f"{file} is a file, where a folder is needed"
    assert below in run("dispatch", "fit", "--experts", "nowhere", "--out", file / "made", fails=True)
    assert below in run("train", "clarify", "--out", file, fails=True)
    assert below in run("demo", "--folder", file, fails=True)
    assert below in run("bench", "knowing-doing", "--out", file / "deep" / "er", fails=True)
    assert below in run("export", "no/such-model", "nowhere", file, fails=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)
        assert "nothing can be written in" in run("chat", "--history", tmp_path / "new" / "talk.json", fails=True)
    assert list(tmp_path.iterdir()) == [file]


Parse = Callable[..., dict[str, object]]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Return a function that parses a command and returns what its verb would be given."""

    def verb(experts: str | None = None, skills: cli.Names | None = None, n: int = 1) -> None:
        found.update(experts=experts, skills=skills, n=n)

    def call(*words: object) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", ["svdexpert", "dispatch", "fit", *map(str, words)])
        cli.run_command({"dispatch": {"fit": verb}}, "svdexpert")
        return found

    found: dict[str, object] = {}
    return call


def test_what_is_typed_wins_over_a_config(parse: Parse, tmp_path: Path) -> None:
    config, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    config.write_text("experts: of/the/config\nn: 2\n")
    other.write_text("n: 3\n")
    for words in ((f"--config={config}", "--experts", "mine"), ("--experts", "mine", "--config", config)):
        assert parse(*words) == {"experts": "mine", "skills": None, "n": 2}
    assert parse("--config", config, "--skills", "call", f"--config={other}")["n"] == 3  # the later config wins
    assert parse("--skills", "call")["skills"] == "call"
    assert parse("--skills", "[call, clarify]")["skills"] == ["call", "clarify"]


def test_a_mistyped_option_is_told_in_two_lines(
    parse: Parse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("exprets: mine\n")
    for words in (("--config", config), ("--exprets", "mine")):
        with pytest.raises(SystemExit) as stop:
            parse(*words)
        assert stop.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert said[0].startswith("svdexpert dispatch fit: ")
        assert said[0].endswith("Did you mean 'experts'?")
        assert said[1:] == ["See svdexpert dispatch fit --help"]
