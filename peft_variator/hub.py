"""Models and adapters in folders and in repositories on the Hub: looked at without loading them, and pushed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    HfApi,
    hf_hub_download,
    parse_local_safetensors_file_metadata,
    parse_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import SafetensorsFileMetadata, TensorInfo, validate_repo_id
from safetensors import SafetensorError

from .model_files import check_model_name


__all__ = ["ModelFiles", "check_push", "open_files", "push_folder"]


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model or an adapter. Of a repository only what is asked for is downloaded, to the Hub's cache.

    Args:
        name: the folder, or the repository.
        revision: revision of the repository; `None`: its main one.
        folder: the files on this machine; `None`: they are in a repository.
        prefix: what the names of the files start with in the repository, `""` or a folder's name with a slash.
        sizes: size of each file in bytes, by its name; `None` where the Hub does not tell.
    """

    name: str
    revision: str | None
    folder: Path | None
    prefix: str
    sizes: dict[str, int | None]

    def __contains__(self, file: str) -> bool:
        return file in self.sizes

    def within(self, subfolder: str) -> ModelFiles:
        """The files of a folder in it, by their names there."""
        start = f"{subfolder.strip('/')}/"
        sizes = {name.removeprefix(start): size for name, size in self.sizes.items() if name.startswith(start)}
        folder = None if self.folder is None else self.folder / subfolder
        return ModelFiles(self.name, self.revision, folder, f"{self.prefix}{start}", sizes)

    def read_json(self, file: str) -> dict[str, Any] | None:
        """The object in a file; `None` if there is no such file.

        Raises:
            OSError: it can't be downloaded or read.
            ValueError: it is no JSON object.
        """
        if file not in self:
            return None
        path = self.folder / file if self.folder is not None else None
        path = path or Path(hf_hub_download(self.name, f"{self.prefix}{file}", revision=self.revision))
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.name}, {self.prefix}{file}: it is no JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.name}, {self.prefix}{file}: it holds a {type(content).__name__}, not an object.")
        return content

    def tensors(self, file: str) -> dict[str, TensorInfo]:
        """Dtype and shape of every tensor of a safetensors file, by name; only its header is read.

        Raises:
            OSError: it can't be read.
            ValueError: it is damaged.
        """
        try:
            found: SafetensorsFileMetadata = (
                parse_local_safetensors_file_metadata(self.folder / file)
                if self.folder is not None
                else parse_safetensors_file_metadata(self.name, f"{self.prefix}{file}", revision=self.revision)
            )
        except (SafetensorsParsingError, SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{self.name}, {self.prefix}{file}: it is no whole safetensors file: {error}") from error
        return found.tensors

    def weights(self, pattern: str) -> dict[str, TensorInfo]:
        """The tensors of all files that match a pattern, such as `"model*.safetensors"`."""
        files = [name for name in self.sizes if "/" not in name and Path(name).match(pattern)]
        return {name: info for file in sorted(files) for name, info in self.tensors(file).items()}

    def bytes_of(self, pattern: str) -> int:
        """Size of the files that match a pattern, as far as it is known."""
        return sum(self.sizes[name] or 0 for name in self.sizes if "/" not in name and Path(name).match(pattern))


def open_files(name: str, revision: str | None = None, subfolder: str | None = None) -> ModelFiles:
    """The files of a folder, or of a repository on the Hub; offline, those of it that are in the cache.

    Args:
        name: path of the folder, or name of the repository.
        revision: branch, tag or commit of the repository.
        subfolder: a folder in it.

    Raises:
        OSError: there is no such folder or repository, or it can't be reached and nothing of it is in the cache.
        ValueError: the name is none that a repository can have, or there is nothing in the subfolder.
    """
    check_model_name(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"{name!r} is a file. Name the folder that it is in.")
        files = _on_the_hub(name, revision)
    elif revision is not None:
        raise ValueError(f"revision={revision!r} is one of a repository on the Hub, and {name!r} is a folder here.")
    else:
        files = _in_folder(name, folder)
    if subfolder:
        files = files.within(subfolder)
        if not files.sizes:
            raise FileNotFoundError(f"{name!r} has no files in a folder {subfolder!r}.")
    return files


def _in_folder(name: str, folder: Path, revision: str | None = None) -> ModelFiles:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes: dict[str, int | None] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    return ModelFiles(name, revision, folder, "", sizes)


def _on_the_hub(name: str, revision: str | None) -> ModelFiles:
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name!r} is no folder here, and no repository on the Hub that you may see: "
            f"{error.server_message or error}. A private one needs `hf auth login` or HF_TOKEN."
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        if isinstance(error, ValueError) or error.response.status_code < 500:  # the Hub has answered
            raise
        return _in_cache(name, revision, error)
    except Exception as error:  # offline, or not to be reached: the HTTP client has errors of its own
        return _in_cache(name, revision, error)
    return ModelFiles(name, info.sha, None, "", {file.rfilename: file.size for file in info.siblings or ()})


def _in_cache(name: str, revision: str | None, reason: Exception) -> ModelFiles:
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise OSError(
            f"There is no folder {name!r} here, no such repository is in the Hub's cache, and the Hub can't be "
            f"reached: {reason}"
        ) from reason
    return _in_folder(name, Path(folder), revision)


def check_push(repo_id: str) -> str:
    """Raise unless a folder can be pushed to a repository: before the work, not after it.

    Args:
        repo_id: name of the repository, `"user/name"`.

    Returns:
        The repository's whole name: without an owner it is of whose token it is.

    Raises:
        OSError: the Hub can't be reached, or refuses the token, or there is none.
        ValueError: no repository can have this name.
    """
    validate_repo_id(repo_id)
    with _errors_of_the_hub(f"Nothing can be pushed to {repo_id!r}"):
        user = HfApi().whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def push_folder(folder: str | Path, repo_id: str, message: str) -> str:
    """Upload all files of a folder to a repository, which is made where it is missing.

    Returns:
        Address of the repository.

    Raises:
        OSError: the Hub can't be reached or refuses it; the folder is what it was.
    """
    with _errors_of_the_hub(f"{folder} is whole, and was not pushed to {repo_id!r}"):
        url = HfApi().create_repo(repo_id, exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    return str(url)


@contextmanager
def _errors_of_the_hub(what: str) -> Iterator[None]:
    """Say what failed; the HTTP client's errors become OSErrors, as those of the Hub are."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{what}: {error}") from error
