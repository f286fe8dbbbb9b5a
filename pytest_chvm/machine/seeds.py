"""The seed of a VM whose config says what cloud-init is told: made at the first use, and kept by what it says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pytest_chvm.base.cache import built_once, keep_latest
from pytest_chvm.errors import InvalidConfigError, MissingRequirementError
from pytest_chvm.guest.seed import seed_files, with_key, write_seed
from pytest_chvm.host.host import Host
from pytest_chvm.host.ssh_key import run_key
from pytest_chvm.model import VmConfig
from pytest_chvm.model.seeds import SEED_FIELDS

# Small, and each test may have its own.
MOST_SEEDS = 256
SEED_FILE = "seed.iso"


def with_seed(config: VmConfig, cache: Path, host: Host) -> VmConfig:
    """Return a config whose `seed_iso` says what its `user_data`, `meta_data` and `network_config` do.

    Raises InvalidConfigError where no image is there to read it, or there is another seed.
    """
    given = config.seed_texts
    names = ", ".join(field for field, name in SEED_FIELDS.items() if name in given)
    if given and config.seed_iso is not None:
        raise InvalidConfigError(
            f"VM {config.name!r}: {names} would make a seed, and it has one: leave out seed_iso, or put them into it",
            vm_name=config.name,
        )
    if given and config.root_disk is None and config.initramfs is None:
        raise InvalidConfigError(
            f"VM {config.name!r}: {names} is for an image's cloud-init, and the built-in guest has none: name a root_disk",
            vm_name=config.name,
        )
    if config.firmware is not None and config.seed_iso is None:
        # Its seed tells it its addresses too, which are not known yet.
        return config.replace(meta_data=with_key(config.meta_data, _public_key(host)))
    if not given:
        return config
    key = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:32]
    target = cache / "seeds" / key

    def build(directory: Path) -> None:
        # The key is that of the run that makes the seed, as is all of a template's. Root is let in when `ssh_command` is asked.
        meta = with_key(config.meta_data, _public_key(host))
        write_seed(seed_files({**given, "meta-data": meta}, **{"instance-id": f"chvm-{key}"}), directory / SEED_FILE)

    built_once(target, build, progress=host.show_progress)
    keep_latest(target, MOST_SEEDS)
    return config.replace(seed_iso=target / SEED_FILE)


def _public_key(host: Host) -> str | None:
    try:
        return run_key(host).public
    except MissingRequirementError:
        # Without OpenSSH nobody here could log in by it.
        return None
