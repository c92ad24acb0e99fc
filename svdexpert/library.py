"""Libraries: folders of experts for one basis, used like a dictionary, with a table of them in a README.

Local, or a read-only copy of a Hugging Face hub repository.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

from svdexpert.errors import ExpertError, UnknownExpertError, did_you_mean
from svdexpert.expert import CARD, TENSORS, Expert
from svdexpert.storage import whole_file

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # a file name holds 255 bytes, a temporary one some more
_TABLE_START, _TABLE_END = "<!-- experts: made by svdexpert -->", "<!-- /experts -->"


class Library(MutableMapping[str, Expert]):
    """A folder of experts for one basis, used like a dictionary; a table of them is kept in its README.md.

    Experts are read when asked for, and read again only when their file has changed.

    Args:
        path: a local folder; it is made when the first expert is added.

    Raises:
        ExpertError: the path is a file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ExpertError(f"{self.path} is a file; a library is a folder of experts.")
        self._read_only = False
        self._loaded: dict[str, tuple[tuple[tuple[int, int, int], ...], Expert]] = {}

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> Library:
        """Return the library in a Hugging Face hub repository, read-only; only expert files are downloaded.

        Args:
            repo_id: `owner/name`.
            revision: branch, tag or commit.
            token: for private repositories, as huggingface_hub takes it.

        Raises:
            ExpertError: the repository cannot be had.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        wanted = [f"*/{CARD}", f"*/{TENSORS}", "README.md"]
        try:
            folder = snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ExpertError(f"The library {repo_id} cannot be had from the hub: {error}") from error
        library = cls(folder)
        library._read_only = True
        return library

    def folder(self, name: str) -> Path:
        """Return where the expert `name` is or would be.

        Raises:
            ExpertError: a name that is no plain file name, or a link that leaves the library.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ExpertError(
                f"{name!r} cannot name an expert: use letters, digits, '.', '_' and '-', beginning with a letter or "
                "digit, 128 at most. A name is never a path."
            )
        folder = self.path / name
        if folder.resolve().parent != self.path.resolve():
            raise ExpertError(f"{folder} leads out of the library (to {folder.resolve()}): it is not followed.")
        return folder

    def __getitem__(self, name: str) -> Expert:
        folder = self.folder(name)
        try:
            stats = [(folder / file).stat() for file in (CARD, TENSORS)]
        except OSError:
            if folder.is_dir():
                Expert.load(folder)  # says what is there instead
            raise UnknownExpertError(f"{self.path} has no expert {name!r}." + did_you_mean(name, self)) from None
        stamp = tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)
        held = self._loaded.get(name)
        if held is None or held[0] != stamp:
            held = self._loaded[name] = (stamp, Expert.load(folder))
        return held[1]

    def __iter__(self) -> Iterator[str]:
        if not self.path.is_dir():
            return iter(())
        return iter(sorted(card.parent.name for card in self.path.glob(f"*/{CARD}") if card.parent.name in self))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        try:
            return (self.folder(name) / CARD).is_file()  # type: ignore[arg-type]
        except ExpertError:  # no plain name, or a link that leaves
            return False

    def __setitem__(self, name: str, expert: Expert) -> None:
        self.add(name, expert, overwrite=True)

    def __delitem__(self, name: str) -> None:
        self.remove(name)

    def add(self, name: str, expert: Expert, *, overwrite: bool = False) -> None:
        """Store an expert under a name.

        Args:
            name: letters, digits, '.', '_', '-'.
            expert: for the same basis as the others here.
            overwrite: replace an expert of that name.

        Raises:
            ExpertError: the name is taken or not a plain name, the library is read-only, the disk refused.
            MismatchError: the others are for another basis.
        """
        self._writable()
        folder = self.folder(name)
        for other in self:
            with suppress(ExpertError):  # a damaged neighbour must not stop the others; loading it says what is wrong
                if other != name:
                    expert.check_fits(self[other].key, who=name, to=f"{self.path} (like {other!r} in it)")
                    break
        if folder.exists() and not overwrite:
            raise ExpertError(f"{self.path} has an expert {name!r} already: pass overwrite=True, or another name.")
        expert.save(folder)
        self._write_readme()

    def remove(self, name: str) -> None:
        """Delete an expert's folder.

        Raises:
            ExpertError: there is none of that name, or the library is read-only.
        """
        self._writable()
        folder = self._existing(name)
        aside = folder.with_name(f".{name}.removed")  # one step, so that a kill leaves it whole or gone
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        shutil.rmtree(aside)
        self._loaded.pop(name, None)
        self._write_readme()

    def rename(self, old: str, new: str) -> None:
        """Give an expert another name.

        Raises:
            ExpertError: there is no `old`, `new` is taken or not a plain name, or the library is read-only.
        """
        self._writable()
        source, target = self._existing(old), self.folder(new)
        if target.exists():
            raise ExpertError(f"{self.path} has an expert {new!r} already: remove it first, or choose another name.")
        source.rename(target)
        self._loaded.pop(old, None)
        self._write_readme()

    def _existing(self, name: str) -> Path:
        folder = self.folder(name)
        if not (folder / CARD).is_file():
            raise UnknownExpertError(f"{self.path} has no expert {name!r}." + did_you_mean(name, self))
        return folder

    def _writable(self) -> None:
        if self._read_only:
            raise ExpertError(f"{self.path} is a read-only copy of a hub repository: copy it to a folder of your own.")

    def _write_readme(self) -> None:
        rows = ["| expert | skill | objective | core | offsets | norm | scores |", "|---|---|---|---|---|---|---|"]
        for name in self:
            try:
                one = self[name]
            except ExpertError:
                rows.append(f"| {name} | cannot be read |  |  |  |  |  |")
                continue
            numbers = sum(offset.numel() for offset in one.offsets.values())
            scores = ", ".join(f"{key} {value}" for key, value in one.scores.items())
            cells = (name, one.skill or "", one.objective or "", one.core, numbers, f"{one.norm():.4g}", scores)
            rows.append("| " + " | ".join(_cell(str(cell)) for cell in cells) + " |")
        table = "\n".join([_TABLE_START, *rows, _TABLE_END])
        readme = self.path / "README.md"
        try:
            text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# Experts in {self.path.name}\n"
            before, start, rest = text.partition(_TABLE_START)
            after = rest.partition(_TABLE_END)[2] if start else "\n"
            with whole_file(readme) as temporary:
                temporary.write_text(f"{before.rstrip()}\n\n{table}{after}", encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ExpertError(
                f"The experts are stored, but their table in {readme} could not be renewed ({error}); the file is "
                "intact. Make it UTF-8 text and free some space; the next change renews it."
            ) from error

    def __repr__(self) -> str:
        return f"Library({str(self.path)!r}: {', '.join(self) or 'empty'})"


def _cell(text: str) -> str:
    """Return text that stays inside one cell of a Markdown table."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return printable.replace("|", "/").replace("<", "&lt;")
