"""Folders for tests of rights and of full disks: they are not below pytest's own folder, which is closed to everybody but root."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# A user that every Linux has, with a home directory that none has.
USER = "nobody"


@contextmanager
def folder(owner: str = "root"):
    """A folder that everybody may look into."""
    path = Path(tempfile.mkdtemp(prefix="guestd-test-", dir="/tmp"))
    account = pwd.getpwnam(owner)
    os.chown(path, account.pw_uid, account.pw_gid)
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


@contextmanager
def small_disk(path: Path, size: str):
    """A disk of its own at `path`."""
    options = f"mode=777,{size}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True).returncode:
        pytest.skip("a full disk was not tested: no tmpfs can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)
