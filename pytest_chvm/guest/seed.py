"""NoCloud seeds: the disk by which cloud-init is told what an image is to become."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

# By this name of its volume cloud-init finds it.
LABEL = "cidata"


def write_seed(files: Mapping[str, str], target: Path) -> None:
    """Write files as an ISO 9660 image with Joliet and Rock Ridge, which cloud-init takes for a NoCloud seed."""
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=LABEL)
    try:
        for number, (name, text) in enumerate(files.items()):
            data = text.encode()
            iso.add_fp(io.BytesIO(data), len(data), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
        iso.write(str(target))
    finally:
        iso.close()
