"""Experts as values, as files, and in libraries."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdexpert import (
    Expert,
    ExpertError,
    Library,
    MismatchError,
    SpectralModel,
    UnknownExpertError,
    conflict,
    decompose,
)
from svdexpert.basis import Basis

Experts = dict[str, Expert]


@pytest.fixture(scope="module")
def basis() -> Basis:
    return decompose(tiny("llama"), k=4, progress=False)


def weights(expert: Expert, basis: Basis) -> dict[str, Tensor]:
    """The change of every weight matrix, written out."""
    changes = {}
    for name, one in basis.factors.items():
        change = expert.change(name)
        core = change.diag() if change.dim() == 1 else change
        changes[name] = one.u_t.T.double() @ core.double() @ one.v.T.double()
    return changes


numbers = st.floats(-4, 4, allow_nan=False).filter(lambda x: x == 0 or abs(x) > 1e-3)
cores = pytest.mark.parametrize("core", ["diag", "dense"])


@cores
@settings(max_examples=20, deadline=None)
@given(x=numbers, y=numbers)
def test_algebra_is_that_of_the_weights(basis: Basis, core: str, x: float, y: float) -> None:
    a, b = (Expert.random(basis, seed=seed, core=core) for seed in (1, 2))
    mixed, of_a, of_b = weights(x * a + y * b, basis), weights(a, basis), weights(b, basis)
    for name in basis.names:
        torch.testing.assert_close(mixed[name], x * of_a[name] + y * of_b[name], atol=1e-5, rtol=1e-5)


@cores
def test_laws_of_a_vector_space(basis: Basis, core: str) -> None:
    a, b = (Expert.random(basis, seed=seed, core=core) for seed in (1, 2))
    zero = Expert.zeros(basis, core)
    assert a + b == b + a
    assert a + zero == a
    assert a - a == zero == 0 * a
    assert -1 * -a == a
    assert 2 * a == a + a == a * 2
    assert a / 2 == 0.5 * a
    assert a != b
    assert a != "a"


@cores
def test_norm_and_dot_are_those_of_the_weights(basis: Basis, core: str) -> None:
    a, b = (Expert.random(basis, seed=seed, core=core) for seed in (1, 2))
    of_a, of_b = weights(a, basis), weights(b, basis)
    assert a.norm() == pytest.approx(float(sum(one.square().sum() for one in of_a.values())) ** 0.5, rel=1e-5)
    assert a.dot(b) == pytest.approx(float(sum((of_a[n] * of_b[n]).sum() for n in basis.names)), rel=1e-4, abs=1e-6)


@cores
def test_conflict_is_closed_form(basis: Basis, core: str) -> None:
    a, b = (Expert.random(basis, seed=seed, core=core) for seed in (1, 2))
    of_a, of_b = weights(a, basis), weights(b, basis)
    found = conflict(a, b)
    for name in basis.names:
        cosine = (of_a[name] * of_b[name]).sum() / (of_a[name].norm() * of_b[name].norm())
        assert found.matrices[name].cosine == pytest.approx(float(cosine), abs=1e-5)
    assert found.total.dot == pytest.approx(a.dot(b))
    assert conflict(a, a).total.cosine == pytest.approx(1)
    assert conflict(a, a).total.opposed == 0
    assert conflict(a, -a).total.opposed == 1
    assert 0 < found.total.opposed < 1
    assert conflict(a, Expert.zeros(basis, core)).total == conflict(Expert.zeros(basis, core), a).total
    shared = Expert.from_offsets(basis, {n: o.abs() for n, o in a.offsets.items()}, core=core)
    assert conflict(shared, shared).total.opposed == 0


def test_flat_is_in_the_order_of_the_basis(basis: Basis, tmp_path: Path) -> None:
    expert = Expert.random(basis)
    loaded = Expert.load(expert.save(tmp_path / "one"))
    assert list(loaded.offsets) == list(loaded.key.matrices) == list(basis.names)
    turned = dataclasses.replace(
        expert,
        key=dataclasses.replace(expert.key, matrices=dict(reversed(expert.key.matrices.items()))),
        offsets=dict(reversed(expert.offsets.items())),
    )
    assert torch.equal(turned.flat(basis), expert.flat(basis))
    assert Expert.from_flat(basis, turned.flat(basis)) == expert == turned


def test_values_that_make_no_expert(basis: Basis) -> None:
    expert = Expert.random(basis)
    with pytest.raises(ExpertError, match="scaled by nan"):
        float("nan") * expert
    with pytest.raises(ExpertError, match="divided by 0"):
        expert / 0
    with pytest.raises(TypeError):
        expert + 1
    with pytest.raises(MismatchError, match="core dense, here diag"):
        Expert.zeros(basis, "dense") + expert
    name = basis.names[0]
    for change, message in (
        (torch.full((4,), float("inf")), "NaN or infinite"),
        (torch.zeros(3), r"shape \(3,\), expected \(4,\)"),
        (torch.zeros(4, dtype=torch.float16), "float16, expected"),
    ):
        with pytest.raises(ExpertError, match=message):
            dataclasses.replace(expert, offsets={**expert.offsets, name: change})
    with pytest.raises(ExpertError, match="1 matrices missing"):
        dataclasses.replace(expert, offsets={n: o for n, o in expert.offsets.items() if n != name})
    with pytest.raises(ExpertError, match=r"core is 'diagonal'.*'diag'"):
        dataclasses.replace(expert, core="diagonal")


def test_an_expert_is_a_copy_of_what_it_was_made_from(basis: Basis) -> None:
    flat = torch.ones(sum(basis.sizes), requires_grad=True)
    expert = Expert.from_flat(basis, flat)
    with torch.no_grad():
        flat.zero_()
    assert all((one == 1).all() and not one.requires_grad for one in expert.offsets.values())


# --- does it fit?


def test_what_does_not_fit_says_how(basis: Basis) -> None:
    expert = Expert.random(basis)
    others = {
        "other weights in 14 of 14": decompose(tiny("llama", seed=1), k=4, progress=False),
        "k 5, here 4": decompose(tiny("llama"), k=5, progress=False),
        "first_layer 2, here 1": decompose(tiny("llama"), k=4, first_layer=2, progress=False),
        "no offsets for .* and 7 more": decompose(tiny("llama"), ["*.mlp.*"], k=4, progress=False),
        "another shape in": decompose(tiny("llama", intermediate_size=52), k=4, progress=False),
        "support sensitivity, here top": decompose(
            tiny("llama"), k=4, support="sensitivity", calibration=[torch.arange(3, 20)[None]], progress=False
        ),
        "other weights in": decompose(tiny("llama").bfloat16(), k=4, progress=False),
    }
    for message, other in others.items():
        with pytest.raises(MismatchError, match=message):
            Expert.random(other).check_fits(basis.key)
        with pytest.raises(MismatchError):
            expert + Expert.random(other)
    same = dataclasses.replace(basis.key, base="elsewhere/same-weights")
    expert.check_fits(same)
    ours = dataclasses.replace(basis.key, revision="aaaa")
    theirs = dataclasses.replace(expert, key=dataclasses.replace(basis.key, revision="bbbb"))
    with pytest.raises(MismatchError, match="revision bbbb, here aaaa"):
        theirs.check_fits(ours)


def test_a_bf16_base_in_fp32_is_the_same_base() -> None:
    half = tiny("llama").bfloat16()
    expert = Expert.random(decompose(half, k=4, progress=False))
    expert.check_on(decompose(half.float(), k=4, progress=False))


def test_other_calibration_data_is_another_basis() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = (
        decompose(
            tiny("llama"),
            k=4,
            support="sensitivity",
            calibration=[torch.randint(3, 96, (2, 9), generator=draw)],
            progress=False,
        )
        for _ in range(2)
    )
    with pytest.raises(MismatchError, match="same calibration data"):
        Expert.random(one).check_on(two)


# --- files


@cores
def test_round_trip_is_byte_stable(basis: Basis, core: str, tmp_path: Path) -> None:
    card = {"skill": "ask", "objective": "dpo", "config": {"lr": 1e-3}, "seed": 7, "scores": {"doing": 0.9, "é": None}}
    expert = dataclasses.replace(Expert.random(basis, core=core), **card)
    first = expert.save(tmp_path / "first")
    loaded = Expert.load(first)
    assert loaded == expert
    assert (loaded.skill, loaded.objective, loaded.config, loaded.seed, loaded.scores) == tuple(card.values())
    assert loaded.key == expert.key
    second = loaded.save(tmp_path / "second")
    assert {file.name for file in first.iterdir()} == {"expert.json", "expert.safetensors"}
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    assert loaded.save(first) == first
    assert (first / "expert.json").read_bytes() == (second / "expert.json").read_bytes()


def test_saving_keeps_what_else_is_there(basis: Basis, tmp_path: Path) -> None:
    folder = Expert.random(basis).save(tmp_path / "one")
    (folder / "notes.md").write_text("mine")
    Expert.random(basis, seed=2).save(folder / "inner")
    Expert.random(basis, seed=1).save(folder)
    assert (folder / "notes.md").read_text() == "mine"
    assert Expert.load(folder / "inner") == Expert.random(basis, seed=2)
    assert Expert.load(folder) == Expert.random(basis, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_saving_does_not_take_a_folder_that_is_not_its_own(basis: Basis, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(ExpertError, match="is not an expert"):
            Expert.random(basis).save(place)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_card_that_could_not_be_read_again_is_not_written(basis: Basis, tmp_path: Path) -> None:
    for change, message in (
        ({"scores": {"doing": object()}}, "JSON"),
        ({"scores": {"doing": float("nan")}}, "JSON"),
        ({"config": {1: "a", "1": "b"}}, "named twice"),
        ({"seed": -1}, "seed is -1"),
        ({"skill": 5}, "skill is 5"),
    ):
        with pytest.raises(ExpertError, match=message):
            dataclasses.replace(Expert.random(basis), **change).save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_saving_through_a_link_replaces_what_it_leads_to(basis: Basis, tmp_path: Path) -> None:
    Expert.random(basis).save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    Expert.random(basis, seed=1).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert Expert.load(tmp_path / "real") == Expert.random(basis, seed=1)
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_files_have_the_permissions_of_the_user(basis: Basis, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        threads = [
            threading.Thread(target=lambda n=n: [Expert.random(basis).save(tmp_path / f"{n}") for _ in range(5)])
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        assert os.umask(before) == 0o027
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o750}


# --- libraries


def test_a_library_is_a_dictionary(basis: Basis, tmp_path: Path) -> None:
    library = Library(tmp_path / "experts")
    assert len(library) == 0
    assert list(library) == []
    a, b = (Expert.random(basis, seed=seed) for seed in (1, 2))
    library.add("ask", a)
    library["doubt"] = b
    assert list(library) == ["ask", "doubt"]
    assert library["ask"] == a
    assert "ask" in library
    assert "../ask" not in library
    assert library.get("none") is None
    assert library["ask"] is library["ask"]  # read once
    library["ask"] = b
    assert library["ask"] == b
    library.rename("ask", "query")
    assert list(library) == ["doubt", "query"]
    library.remove("query")
    del library["doubt"]
    assert len(library) == 0


def test_the_readme_of_a_library_lists_it(basis: Basis, tmp_path: Path) -> None:
    library = Library(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n\nWritten by hand.\n")
    library.add("ask", dataclasses.replace(Expert.random(basis), skill="a|b", scores={"doing": 0.9}))
    library.add("doubt", Expert.random(basis, seed=1))
    text = (tmp_path / "README.md").read_text()
    assert "Written by hand." in text
    assert "| ask | a/b |  | diag | 56 |" in text
    assert "doing 0.9" in text
    library.rename("doubt", "disagree")
    library.remove("ask")
    text = (tmp_path / "README.md").read_text()
    assert "| ask |" not in text
    assert "| disagree |" in text
    assert text.count("| expert |") == 1


def test_mistakes_with_libraries_are_explained(basis: Basis, tmp_path: Path) -> None:
    library = Library(tmp_path / "experts")
    library.add("clarify", Expert.random(basis))
    with pytest.raises(UnknownExpertError, match=r"no expert 'clarfy'\. Did you mean 'clarify'"):
        library["clarfy"]
    with pytest.raises(ExpertError, match="Did you mean 'clarify'"):
        Expert.load(tmp_path / "experts" / "clarfy")
    with pytest.raises(ExpertError, match="overwrite=True"):
        library.add("clarify", Expert.random(basis))
    with pytest.raises(MismatchError, match="like 'clarify' in it"):
        library.add("other", Expert.random(decompose(tiny("llama", seed=1), k=4, progress=False)))
    for name in ("../up", "/root", "", ".hidden", "a/b", "a\nb", "a\0b"):
        with pytest.raises(ExpertError, match="cannot name an expert"):
            library.add(name, Expert.random(basis))
    library.add("call", Expert.random(basis))
    (library.path / "call" / "expert.safetensors").write_bytes(b"damaged")
    library.add("third", Expert.random(basis))
    assert "| call | cannot be read |" in (library.path / "README.md").read_text()
    library.remove("third")
    with pytest.raises(ExpertError, match="'call' already"):
        library.rename("clarify", "call")
    with pytest.raises(UnknownExpertError):
        library.remove("none")
    assert list(library) == ["call", "clarify"]
    assert list(Library(tmp_path / "experst")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ExpertError, match="is a file; a library is a folder"):
        Library(tmp_path / "file")


def test_links_out_of_a_library_are_not_followed(basis: Basis, tmp_path: Path) -> None:
    outside = Expert.random(basis).save(tmp_path / "outside")
    library = Library(tmp_path / "experts")
    library.add("inside", Expert.random(basis))
    (library.path / "link").symlink_to(outside)
    with pytest.raises(ExpertError, match="leads out of the library"):
        library["link"]
    with pytest.raises(ExpertError, match="leads out of the library"):
        library.remove("link")
    Expert.random(basis).save(library.path / "no plain name")
    assert list(library) == ["inside"]
    assert dict(library).keys() == {"inside"}
    assert "link" not in library
    assert (outside / "expert.json").is_file()


def test_a_hub_library_is_read_only(basis: Basis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself is not reachable in tests; its snapshots hold links to files beside them."""
    blobs = Expert.random(basis).save(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot" / "clarify"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    asked = {}

    def download(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(snapshot.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    library = Library.from_hub("someone/experts", revision="v1")
    assert (asked["repo_id"], asked["revision"]) == ("someone/experts", "v1")
    assert library["clarify"] == Expert.random(basis)
    for change in (lambda: library.remove("clarify"), lambda: library.add("x", Expert.random(basis))):
        with pytest.raises(ExpertError, match="read-only"):
            change()


def test_a_hub_that_cannot_be_reached_is_explained() -> None:
    with pytest.raises(ExpertError, match="someone/experts cannot be had"):
        Library.from_hub("someone/experts")


def test_experts_move_between_processes_and_models(tmp_path: Path, ids: Tensor) -> None:
    with SpectralModel.attach(tiny("llama"), k=4, progress=False) as model:
        expert = Expert.random(model.basis, std=0.3)
        want = model.logits(ids, expert)
        expert.save(tmp_path / "one")
    shutil.move(tmp_path / "one", tmp_path / "two")
    with SpectralModel.attach(tiny("llama"), k=4, progress=False) as model:
        assert torch.equal(model.logits(ids, Expert.load(tmp_path / "two")), want)
