"""An image that its own boot loader boots: cloud-init puts into its `/run` what the host needs, told by the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pytest_chvm.guest import renew
from pytest_chvm.guest.images.initramfs import UNITS
from pytest_chvm.guest.kinds.stock import HOSTNAME_WORD, StockGuest
from pytest_chvm.guest.seed import seed_files, write_seed
from pytest_chvm.model import VmConfig

# Its addresses are those that the host says.
NO_NETWORK = "config: disabled\n"


@dataclass(frozen=True, slots=True)
class FirmwareGuest(StockGuest):
    """A stock image behind firmware; `busybox` is what its shell needs."""

    busybox: Path = Path()

    def told_otherwise(self, words: Sequence[str], directory: Path) -> VmConfig | None:
        """Return its config with a seed, made in `directory`, that tells it all."""
        config = self.config
        name = next(word.removeprefix(HOSTNAME_WORD) for word in words if word.startswith(HOSTNAME_WORD))
        given = {"network-config": NO_NETWORK, **config.seed_texts}
        files = seed_files(given, **{"instance-id": f"chvm-{self.nonce}", "local-hostname": name})
        images = resources.files("pytest_chvm.guest.images")
        more = {
            "busybox": self.busybox.read_bytes(),
            "renew": renew.program(config.architecture),
            "configure_any.sh": resources.files("pytest_chvm.guest").joinpath("configure_any.sh").read_bytes(),
            "stock.sh": images.joinpath("stock.sh").read_bytes(),
            "words": "".join(f"{word}\n" for word in words).encode(),
            **{unit: images.joinpath("units", unit).read_bytes() for unit in UNITS},
        }
        seed = directory / "seed.iso"
        write_seed({**files, "vendor-data": images.joinpath("boothook.sh").read_text()}, seed, more)
        return config.replace(seed_iso=seed)
