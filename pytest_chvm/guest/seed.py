"""NoCloud seeds: the disk by which cloud-init is told what an image is to become."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from pytest_chvm.model.seeds import CLOUD_CONFIG

# By this name of its volume cloud-init finds it.
LABEL = "cidata"
# The directory of what is not cloud-init's.
OURS = "chvm"


def seed_files(given: Mapping[str, str], **meta: str) -> dict[str, str]:
    """Return the files of a seed: those given, and those that cloud-init needs beside them; `meta` are meta data by default."""
    return {"user-data": f"{CLOUD_CONFIG}\n", **given, "meta-data": _changed(given.get("meta-data"), meta)}


def with_key(meta_data: str | None, public_key: str | None) -> str:
    """Return meta data with a public key, if there is one, for the image's users (root, where the image lets root in)."""
    if public_key is None:
        return meta_data or ""
    import yaml

    known = (yaml.safe_load(meta_data or "") or {}).get("public-keys")
    listed = list(known.values()) if isinstance(known, dict) else known if isinstance(known, list) else [known] if known else []
    return _changed(meta_data, {}, {"public-keys": [*listed, public_key]})


def _changed(meta_data: str | None, defaults: Mapping[str, object], changes: Mapping[str, object] | None = None) -> str:
    import yaml

    meta = {**defaults, **(yaml.safe_load(meta_data or "") or {}), **(changes or {})}
    return yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)


def write_seed(files: Mapping[str, str], target: Path, ours: Mapping[str, bytes] | None = None) -> None:
    """Write files as an ISO 9660 image with Joliet and Rock Ridge, which cloud-init takes for a NoCloud seed.

    `ours` are files of a directory `chvm` in it.
    """
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    try:
        for number, (name, text) in enumerate(files.items()):
            _add(iso, text.encode(), f"/FILE{number}.;1", name, f"/{name}")
        if ours:
            iso.add_directory(f"/{OURS.upper()}", rr_name=OURS, joliet_path=f"/{OURS}")
        for number, (name, data) in enumerate((ours or {}).items()):
            _add(iso, data, f"/{OURS.upper()}/FILE{number}.;1", name, f"/{OURS}/{name}")
        iso.write(str(target))
    finally:
        iso.close()


def _add(iso: object, data: bytes, place: str, name: str, joliet_path: str) -> None:
    iso.add_fp(io.BytesIO(data), len(data), place, rr_name=name, joliet_path=joliet_path)  # type: ignore[attr-defined]
