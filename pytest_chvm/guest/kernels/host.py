"""The kernel that the host runs."""

from __future__ import annotations

import os
from pathlib import Path

from pytest_chvm.errors import MissingRequirementError


def host_image() -> Path:
    """Return the image of the host's kernel; raises MissingRequirementError, in words, where it is not there or not readable."""
    release = os.uname().release
    refused = []
    for image in (Path(f"/boot/vmlinuz-{release}"), Path(f"/lib/modules/{release}/vmlinuz")):
        if os.access(image, os.R_OK):
            return image
        refused.append(f"{image}: {'not readable by you' if image.exists() else 'not there'}")
    raise MissingRequirementError(
        f"the host's kernel, {release}, cannot be had: {'; '.join(refused)}. A container has its host's kernel, and not that one's "
        "file; where only root may read it, copy it, or 'chmod a+r' it"
    )
