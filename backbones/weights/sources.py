"""Where weights are: in a file, in a folder, at a URL, on the Hub, or where a model's authors published them."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import timm
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from timm.models import _hub

from backbones.weights.files import INDEX, NoWeightFileError, parts
from backbones.weights.rules import CheckpointError

# What programs write into the folder of a model that they save, the first found is read.
_SAVED = ("model.safetensors", "pytorch_model.bin", f"model.safetensors{INDEX}", f"pytorch_model.bin{INDEX}")
_TIMEOUT = 10.0  # seconds without an answer


def locate(checkpoint: str, arch: str) -> dict[str, Any]:
    """The fields of a pretrained configuration for a user's ``checkpoint``.

    Args:
        checkpoint: a file or a folder (also as "local-dir:PATH"), a URL, a repository on the Hub as
            "hf-hub:USER/NAME" or "hf-hub:USER/NAME@REVISION", "published" for the weights that the authors of
            ``arch`` released, or "published:NAME" for those of another model.
        arch: registered name.

    Raises:
        CheckpointError: "published" names no model.
    """
    kind, _, rest = checkpoint.partition(":")
    if kind in ("http", "https"):
        return {"url": checkpoint}
    if kind in ("hf-hub", "hf_hub"):
        return {"hf_hub_id": rest}
    if kind != "published":
        return {"file": rest if kind == "local-dir" else checkpoint}
    name = rest or arch
    if not timm.is_model(name):
        raise CheckpointError(f"got {checkpoint!r}, but there is no model {name!r}")
    return cast(Any, timm.get_pretrained_cfg(name)).to_dict() | {"architecture": name}


def fetch(cfg: Mapping[str, Any], name: str, hint: str, cache_dir: str | Path | None = None) -> Path:
    """The weight file that a pretrained configuration points to, downloaded into a cache if it is not local.

    Args:
        cfg: fields of timm's ``PretrainedCfg``; the first that is set counts, of ``file`` (or a folder),
            ``hf_hub_id`` and ``url``.
        name: of the model, for messages.
        hint: how to load a local file, for messages.
        cache_dir: where downloads are kept.

    Raises:
        NoWeightFileError: there is no such file, or no weights in the folder.
        CheckpointError: there are no weights, a program cannot download them, or the download failed.
    """
    if cfg.get("file"):
        return _local(Path(cfg["file"]))
    repository, url = cfg.get("hf_hub_id"), cfg.get("url")
    if not repository and not url:
        raise CheckpointError(f"{name}: its authors released no weights ({cfg.get('origin_url')}); {hint}")
    if not repository and "drive.google.com" in str(url):
        raise CheckpointError(f"{name}: download its weights by hand from {url}; {hint}")
    where = f"{repository} on the Hub" if repository else url
    try:
        if repository:
            return _from_hub(repository, cfg.get("hf_hub_filename"), cache_dir)
        with _socket_timeout(_TIMEOUT):
            return Path(_hub.download_cached_file(cast(str, url), cache_dir=cache_dir))
    except (OSError, EntryNotFoundError, RuntimeError) as error:  # RuntimeError: the hash differs
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{name}: cannot be downloaded from {where} ({reason}); {hint}") from error


def _local(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise NoWeightFileError(f"no weight file at {path}")
        return path
    found = [path / name for name in _SAVED if (path / name).is_file()]
    found = found or sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".bin"))
    if not found:
        raise NoWeightFileError(f"no weight file in the folder {path}, expected {' or '.join(_SAVED[:2])}")
    if found[0].name not in _SAVED and len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"several weight files in the folder {path}, say which: {names}")
    return found[0]


def _from_hub(repository: str, filename: str | None, cache_dir: str | Path | None) -> Path:
    repo, revision = _hub.hf_split(repository)
    # huggingface_hub would try again for half a minute.
    offline: dict[str, Any] = {} if _reachable(constants.ENDPOINT) else {"local_files_only": True}
    names = (filename,) if filename else _SAVED

    def download(name: str) -> Path:
        return Path(_hub.hf_hub_download(repo, name, revision=revision, cache_dir=cache_dir, **offline))

    for name in names:
        try:
            path = download(name)
        except EntryNotFoundError as error:
            missing = error
            continue
        if name.endswith(INDEX):
            for part in parts(path):
                download(part)  # into the index's folder
        return path
    if offline:
        wanted = " or ".join(names[:2])
        raise EntryNotFoundError(f"{constants.ENDPOINT} does not answer, and {wanted} is not in the cache")
    raise missing


def _reachable(url: str) -> bool:
    try:
        urlopen(Request(url, method="HEAD"), timeout=_TIMEOUT).close()
    except HTTPError:
        return True
    except URLError as error:  # certificates are for huggingface_hub to judge
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """timm and PyTorch set no timeout for downloads."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
