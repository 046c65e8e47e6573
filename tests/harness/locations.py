"""Where the things under test are. Each can be moved by an environment variable."""

import os
import shutil
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RELEASE = REPOSITORY / "target/x86_64-unknown-linux-gnu/release"


def _built(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.fail(f"{path} is missing: build it first, or set {variable}", pytrace=False)
    return path


def hostd() -> Path:
    return _built("HOSTD_BIN", RELEASE / "hostd")


def guestd() -> Path:
    return _built("GUESTD_BIN", RELEASE / "guestd")


def images() -> Path:
    return _built("IMAGES_DIR", REPOSITORY / "target/guest")


def vhost_device_vsock() -> Path:
    return _built("VHOST_DEVICE_VSOCK", REPOSITORY / "target/tools/bin/vhost-device-vsock")


def node_modules() -> Path:
    return _built("TESTS_NODE_MODULES", REPOSITORY / "target/node/node_modules")


def xtask() -> Path:
    """The project's own command, built by whoever runs `cargo xtask test`."""
    if "XTASK_BIN" in os.environ:
        return _built("XTASK_BIN", Path())
    built = [path for kind in ("debug", "release") if (path := RELEASE.parent / kind / "xtask").exists()]
    if not built:
        pytest.fail(f"no xtask below {RELEASE.parent}: build it first, or set XTASK_BIN", pytrace=False)
    return max(built, key=lambda path: path.stat().st_mtime)


def require_qemu() -> None:
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("no microVM was tested: qemu-system-x86_64 is not on PATH")


def require_runc() -> None:
    if not shutil.which("runc"):
        pytest.skip("no container was tested: runc is not on PATH")
    if os.geteuid() != 0:
        pytest.skip("no container was tested: runc needs root here")
