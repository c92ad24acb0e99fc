"""Nothing unsound acts on a model, nothing of the user's is altered by trying, nothing is ever half-written."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attacks.mutations import (
    ATTACKS,
    CARD,
    TENSORS,
    Attack,
    Payload,
    attach,
    card_text,
    dump,
    executed,
    read,
    save_sound,
    score,
    seal,
    tiny_llama,
)
from svdexpert import (
    Expert,
    ExpertError,
    Library,
    MismatchError,
    SpectralModel,
    SvdExpertError,
    UnknownExpertError,
    export_lora,
)
from svdexpert.basis import BasisKey, MatrixKey

PROMPTS = torch.arange(12).view(2, 6)
Untouched = Callable[[], torch.Tensor]


def listing(folder: Path) -> dict[str, str]:
    """Return everything below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            held = f"link to {os.readlink(path)}"
        else:
            held = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = held
    return found


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    before = listing(folder)
    yield
    assert listing(folder) == before


# --- the attacks --------------------------------------------------------------------------------------------------


def test_there_are_enough_attacks_of_different_kinds() -> None:
    assert len([name for name in ATTACKS if not name.endswith(", resealed")]) >= 40


def test_the_copy_that_is_attacked_is_sound(base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    expert = Expert.load(victim)
    assert not torch.equal(base.logits(PROMPTS, expert), untouched())
    assert torch.equal(base.logits(PROMPTS, "victim", library=Library(victim.parent)), base.logits(PROMPTS, expert))


def test_a_new_seal_is_as_good_as_the_old_one(base: SpectralModel, victim: Path) -> None:
    before = Expert.load(victim)
    seal(victim, read(victim)[0])
    assert Expert.load(victim) == before
    assert base.logits(PROMPTS, Expert.load(victim)).isfinite().all()


@pytest.mark.parametrize("attack", [pytest.param(one, id=name) for name, one in ATTACKS.items()])
def test_is_refused(attack: Attack, base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    """As a value, from a library, in a row of a batch: the body never runs."""
    attack.mutate(victim)
    with nothing_written(victim.parent):
        with pytest.raises(SvdExpertError) as refusal:
            base.logits(PROMPTS, Expert.load(victim))
        with pytest.raises(attack.error):
            base.generate(PROMPTS, [{"victim": 0.5}, {}], library=Library(victim.parent), max_new_tokens=1)
        with pytest.raises(attack.error), base.using("victim", Library(victim.parent)):
            pytest.fail("the body ran")
    assert isinstance(refusal.value, attack.error), refusal.value
    assert attack.word in str(refusal.value)
    assert not executed(victim).exists()


@pytest.mark.parametrize(
    "attack", [pytest.param(one, id=name) for name, one in ATTACKS.items() if one.error is MismatchError]
)
def test_is_not_exported(
    attack: Attack, base: SpectralModel, victim: Path, tmp_path: Path, untouched: Untouched
) -> None:
    attack.mutate(victim)
    with nothing_written(tmp_path), pytest.raises(MismatchError):
        export_lora(Expert.load(victim), base, tmp_path / "lora")


def test_a_dense_expert_does_not_mix_with_diagonal_ones(
    base: SpectralModel, victim: Path, untouched: Untouched
) -> None:
    dense = save_sound(base, victim.parent / "dense", core="dense")
    base.logits(PROMPTS, Expert.load(dense))
    with pytest.raises(MismatchError, match="core"):
        base.logits(PROMPTS, {"victim": 0.5, "dense": 0.5}, library=Library(victim.parent))
    with pytest.raises(SvdExpertError, match="core"):
        base.logits(PROMPTS, [Expert.load(victim), Expert.load(dense)])


def test_one_bad_expert_does_not_hide_the_others(base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    save_sound(base, victim.parent / "good", seed=3)
    (victim / TENSORS).write_bytes(b"")
    library = Library(victim.parent)
    assert list(library) == ["good", "victim"]
    base.logits(PROMPTS, "good", library=library)
    with pytest.raises(ExpertError):
        base.logits(PROMPTS, [{"good": 1.0}, {"victim": 1.0}], library=library)


def test_an_expert_damaged_after_it_was_read_is_not_read_again_in_silence(victim: Path) -> None:
    library = Library(victim.parent)
    held = library["victim"]
    card_text(lambda card: card.replace("clarify", "clarifx"))(victim)
    with pytest.raises(ExpertError, match="SHA-256"):
        library["victim"]
    assert held.skill == "clarify"


def test_the_payload_would_run_if_it_were_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    {
        "base": "other/llama",
        "library_version": "9.9",
        "skill": "disagree",
        "objective": "dpo",
        "config": {"steps": 1},
        "seed": 1,
        "scores": {"doing": 1.0},
    }.items(),
)
def test_nothing_on_the_card_can_be_exchanged_under_its_seal(name: str, value: object, victim: Path) -> None:
    card, _ = read(victim)
    assert card[name] != value
    (victim / CARD).write_text(dump(card | {name: value}))
    with pytest.raises(ExpertError, match="SHA-256"):
        Expert.load(victim)


def test_a_sound_expert_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header: one in 32 begins with 0x80, as pickles do."""
    first_bytes = set()
    for length in range(1, 129, 4):
        name = "m" * length
        key = BasisKey("tiny", None, 2, "top", 0, {name: MatrixKey((2, 2), 2, "0" * 64)})
        expert = Expert(key, {name: torch.ones(2)}, {name: torch.ones(2)})
        folder = expert.save(tmp_path / "expert")
        first_bytes.add((folder / TENSORS).read_bytes()[0])
        assert Expert.load(folder) == expert
    assert 0x80 in first_bytes


def test_no_depth_of_nesting_is_anything_but_refused(victim: Path) -> None:
    """Just below the depth that the parser refuses, checking the digest must not fail in its own way.

    From Python 3.13 on the parser goes thousands of levels deep.
    """
    sound = (victim / CARD).read_text()
    for depth in (*range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 10, 7), 2000, 5000, 9000):
        (victim / CARD).write_text(sound)
        score("[" * depth + "]" * depth)(victim)
        with pytest.raises(ExpertError):
            Expert.load(victim)


@pytest.mark.parametrize("file", [CARD, TENSORS])
def test_no_single_flipped_bit_passes(file: str, victim: Path) -> None:
    """White space apart, which the card's digest does not cover because it changes nothing."""
    sound = (victim / file).read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        at, bit = draw.randrange(len(sound)), 1 << draw.randrange(8)
        flipped = sound[:at] + bytes([sound[at] ^ bit]) + sound[at + 1 :]
        if file == CARD and chr(sound[at]).isspace() and chr(flipped[at]).isspace():
            continue
        (victim / file).write_bytes(flipped)
        with pytest.raises(ExpertError):
            Expert.load(victim)


@pytest.mark.parametrize("file", [CARD, TENSORS])
def test_no_truncation_passes(file: str, victim: Path) -> None:
    sound = (victim / file).read_bytes()
    for length in range(0, len(sound.rstrip()), 61):
        (victim / file).write_bytes(sound[:length])
        with pytest.raises(ExpertError):
            Expert.load(victim)


@pytest.mark.parametrize("file", [CARD, TENSORS])
def test_a_folder_that_goes_away_while_it_is_read_is_refused(
    file: str, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removed it, or is putting a new one in its place."""
    read_bytes = Path.read_bytes

    def too_late(path: Path) -> bytes:
        if path.name == file:
            shutil.rmtree(path.parent)
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", too_late)
        with pytest.raises(ExpertError, match=file):
            Expert.load(victim)


@pytest.mark.parametrize("file", [CARD, TENSORS])
def test_a_pipe_is_refused_instead_of_waited_for(file: str, victim: Path) -> None:
    def give_up(*_: object) -> None:
        raise AssertionError(f"waits for ever on a pipe named {file}")

    (victim / file).unlink()
    os.mkfifo(victim / file)
    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(ExpertError, match=file):
            Expert.load(victim)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- names --------------------------------------------------------------------------------------------------------

NAMES = [
    "../victim",
    "../library/victim",
    "victim/../victim",
    "victim/",
    "./victim",
    "/etc",
    "//victim",
    "..",
    ".",
    "",
    " ",
    " victim",
    "victim ",
    ".victim",
    "-victim",
    "~",
    "victim\0",
    "victim\n",
    "vic\ntim",
    "victim\\..",
    "C:victim",
    "*",
    "vict?m",
    "víctim",
    "\ud800",
    "victim\u202e",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_is_never_a_path(name: str, base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    library = Library(victim.parent)
    expert = library["victim"]
    with nothing_written(victim.parent.parent):
        assert name not in library
        for door in (
            lambda: library[name],
            lambda: library.add(name, expert),
            lambda: library.add(name, expert, overwrite=True),
            lambda: library.remove(name),
            lambda: library.rename(name, "fresh"),
            lambda: library.rename("victim", name),
            lambda: library.__setitem__(name, expert),
            lambda: library.__delitem__(name),
            lambda: base.logits(PROMPTS, name, library=library),
            lambda: base.logits(PROMPTS, {name: 1.0}, library=library),
        ):
            with pytest.raises(ExpertError, match="never a path"):
                door()


@pytest.mark.parametrize("name", [None, 7, b"victim", Path("victim"), ("victim",)], ids=repr)
def test_a_name_is_text(name: object, victim: Path) -> None:
    with pytest.raises(ExpertError, match="cannot name"):
        Library(victim.parent)[name]  # type: ignore[index]


def test_a_name_longer_than_a_file_name_is_unknown(victim: Path) -> None:
    with pytest.raises(ExpertError):
        Library(victim.parent)["v" * 300]
    assert "v" * 300 not in Library(victim.parent)


def test_a_link_out_of_the_library_is_not_followed(base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    outside = Path(shutil.move(victim, victim.parent.parent / "outside"))
    (victim.parent / "victim").symlink_to(outside)
    library = Library(victim.parent)
    expert = Expert.load(outside)
    with nothing_written(outside.parent):
        for door in (
            lambda: library["victim"],
            lambda: library.add("victim", expert, overwrite=True),
            lambda: library.remove("victim"),
            lambda: library.rename("victim", "fresh"),
            lambda: base.logits(PROMPTS, "victim", library=library),
        ):
            with pytest.raises(ExpertError, match="leads out"):
                door()


def test_a_name_that_does_not_exist_has_a_suggestion(base: SpectralModel, victim: Path, untouched: Untouched) -> None:
    library = Library(victim.parent)
    for door in (
        lambda: library["victm"],
        lambda: library.remove("victm"),
        lambda: library.rename("victm", "other"),
        lambda: base.logits(PROMPTS, [{"victm": 1.0}, None], library=library),
    ):
        with pytest.raises(UnknownExpertError, match="Did you mean 'victim'"):
            door()
    with pytest.raises(ExpertError, match="Did you mean 'victim'"):
        Expert.load(victim.parent / "victm")


def test_a_library_takes_no_expert_of_another_base(victim: Path) -> None:
    library = Library(victim.parent)
    with attach(tiny_llama(1)) as other:
        foreign = Expert.random(other.basis)
    with nothing_written(victim.parent), pytest.raises(MismatchError, match="other weights"):
        library.add("foreign", foreign)


def test_saving_never_replaces_what_is_not_an_expert(base: SpectralModel, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    expert = Expert.random(base.basis)
    for place in ("thesis", "file", "file/expert"):
        with nothing_written(tmp_path), pytest.raises(ExpertError):
            expert.save(tmp_path / place)


@pytest.mark.parametrize("skill", ["<!-- /experts -->", "<!-- experts: made by svdexpert -->", "a | b\n# c", "\x1b[2J"])
def test_no_skill_breaks_the_table_of_a_library(skill: str, victim: Path) -> None:
    library = Library(victim.parent)
    readme = victim.parent / "README.md"
    readme.write_text("# Mine\n")
    expert = replace(library["victim"], skill=skill)
    library.add("odd", expert)
    first = readme.read_text()
    assert first.startswith("# Mine\n")
    assert "\x1b" not in first
    library.add("odd", expert, overwrite=True)
    assert readme.read_text() == first


def test_a_readme_in_another_encoding_is_not_lost(victim: Path) -> None:
    library = Library(victim.parent)
    readme = victim.parent / "README.md"
    readme.write_bytes("# Köln\n".encode("latin-1"))
    with suppress(ExpertError):
        library.add("fresh", library["victim"])
    assert readme.read_bytes().startswith("# Köln".encode("latin-1"))


# --- writes that fail half-way ------------------------------------------------------------------------------------


def in_child(action: Callable[[], object]) -> int:
    """Run something in a forked process; return its exit status, negative for the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except SvdExpertError as error:
            os._exit(3 if "intact" in str(error) else 4)
        except BaseException:
            os._exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def leftovers(folder: Path) -> list[str]:
    """Return what stands beside the folder of an expert."""
    return [path.name for path in folder.parent.iterdir() if path != folder]


@pytest.fixture
def replacement(base: SpectralModel) -> Expert:
    """An expert whose two files are both larger than those it replaces."""
    return Expert.from_offsets(
        base.basis, Expert.random(base.basis, seed=1, core="dense").offsets, core="dense", config={"log": "x" * 30_000}
    )


@pytest.mark.parametrize("limit", [0, 1, 1000, 7000, 20_000])
def test_a_disk_quota_leaves_the_old_expert(limit: int, victim: Path, replacement: Expert) -> None:
    def save_within_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        replacement.save(victim)

    with nothing_written(victim.parent):
        assert in_child(save_within_limit) == 3
    assert Expert.load(victim).skill == "clarify"


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_disk_quota_leaves_the_old_library(limit: int, victim: Path, replacement: Expert) -> None:
    def add_within_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        Library(victim.parent).add("fresh", Expert.load(victim))

    with nothing_written(victim.parent):
        assert in_child(add_within_limit) in (3, 4)


def test_a_disk_quota_leaves_the_readme(victim: Path) -> None:
    """The expert fits, the table of the library with the user's own text does not."""
    readme = victim.parent / "README.md"
    readme.write_text("# Mine\n" + "word " * 10_000)
    before = readme.read_bytes()

    def add_within_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        Library(victim.parent).add("fresh", Expert.load(victim))

    assert in_child(add_within_limit) in (3, 4)
    assert readme.read_bytes() == before
    assert set(Library(victim.parent)) <= {"victim", "fresh"}
    assert not [path.name for path in victim.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "call",
    [
        "pathlib.Path.write_bytes",
        "pathlib.Path.write_text",
        "pathlib.Path.mkdir",
        "tempfile.mkdtemp",
        "shutil.copytree",
        "os.chmod",
        "os.rename",
    ],
)
@pytest.mark.parametrize("spared", [0, 1])
def test_a_full_disk_at_any_step_leaves_the_old_expert(
    call: str, spared: int, victim: Path, replacement: Expert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call fails, or the second; a save that needs only one of them succeeds."""
    old, real, count = Expert.load(victim), pkgutil.resolve_name(call), 0

    def full(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == spared + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(call, full)
        try:
            replacement.save(victim)
            saved = True
        except ExpertError:
            saved = False
    assert saved is (count <= spared)
    assert Expert.load(victim) == (replacement if saved else old)
    assert leftovers(victim) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", range(1, 6))
def test_a_kill_at_any_step_leaves_the_old_or_the_new_expert(
    step: int, when: str, victim: Path, replacement: Expert, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at the n-th call that changes the folder's name, mode or files."""
    old, count = Expert.load(victim), 0

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == step and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    def save() -> None:
        for name in ("rename", "replace", "chmod"):
            setattr(os, name, deadly(getattr(os, name)))
        shutil.rmtree = deadly(shutil.rmtree)  # type: ignore[assignment]
        Path.write_bytes = deadly(Path.write_bytes)  # type: ignore[method-assign, assignment]
        replacement.save(victim)

    assert in_child(save) in (0, -signal.SIGKILL)
    assert Expert.load(victim) in (old, replacement)
    assert list(Library(victim.parent)) == ["victim"]


def test_kills_at_random_moments_leave_the_old_or_the_new_expert(victim: Path, replacement: Expert) -> None:
    old = Expert.load(victim)
    draw = random.Random(0)

    def save_for_ever() -> None:
        while True:
            replacement.save(victim)
            old.save(victim)

    for _ in range(15):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert Expert.load(victim) in (old, replacement)
    assert all(re.fullmatch(r"\.victim\..*\.(tmp|old)", name) for name in leftovers(victim))
    assert list(Library(victim.parent)) == ["victim"]
    old.save(victim)
    assert Expert.load(victim) == old


def test_readers_never_see_half_an_expert(victim: Path, replacement: Expert) -> None:
    """Another process replaces the expert as fast as it can while this one reads."""
    old = Expert.load(victim)
    child = os.fork()
    if child == 0:
        try:
            while True:
                replacement.save(victim)
                old.save(victim)
        finally:
            os._exit(1)
    whole = 0
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            with suppress(ExpertError):  # the new card beside the old tensors: refused, because the digests disagree
                assert Expert.load(victim) in (old, replacement)
                whole += 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert whole > 0
