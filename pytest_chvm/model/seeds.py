"""What cloud-init is told by a NoCloud seed, as text: user data, meta data and a network configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_chvm.errors import InvalidConfigError

# The fields of a config that make a seed, and the files of one.
SEED_FIELDS = {"user_data": "user-data", "meta_data": "meta-data", "network_config": "network-config"}
CLOUD_CONFIG = "#cloud-config"
# By what cloud-init tells the formats apart (its docs, "User data formats"); without one of these it does nothing with the text.
FORMATS = (
    CLOUD_CONFIG, "#!", "#include", "#cloud-boothook", "#cloud-config-archive", "#part-handler", "## template:", "Content-Type:",
    "MIME-Version:",
)  # fmt: skip


def seed_text(key: str, value: object) -> str:
    """Return what a field gives as the text of its file; raises InvalidConfigError where cloud-init could not read it.

    A mapping becomes YAML, as user data a `#cloud-config`. Of a text, what is YAML is checked.
    """
    if isinstance(value, Mapping):
        text = _as_yaml(key, value)
        return f"{CLOUD_CONFIG}\n{text}" if key == "user_data" else text
    if not isinstance(value, str):
        raise InvalidConfigError(f"{key}={str(value)[:80]!r}, expected a text or a mapping")
    if key == "user_data":
        if not value.startswith(FORMATS):
            raise InvalidConfigError(
                f"user_data begins with {value[:40]!r}, and cloud-init does nothing with that: expected a first line "
                f"'{CLOUD_CONFIG}' before YAML, '#!' before a script, or another of {', '.join(FORMATS[2:])}"
            )
        if value.split("\n", 1)[0].strip() != CLOUD_CONFIG:
            return value
    _check_mapping(key, value)
    return value


def _as_yaml(key: str, value: Mapping[Any, Any]) -> str:
    import yaml

    try:
        return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise InvalidConfigError(f"{key} has what YAML cannot say: {error}") from error


def _check_mapping(key: str, text: str) -> None:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = str(error).replace('in "<unicode string>", ', "at ")
        raise InvalidConfigError(f"{key} is no YAML: {' '.join(where.split())}") from error
    if found is not None and not isinstance(found, dict):
        raise InvalidConfigError(f"{key} is a {type(found).__name__}, expected a mapping: {str(found)[:80]!r}")
