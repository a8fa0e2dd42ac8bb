"""What lies in the page cache is known without reading it."""

import os
from pathlib import Path

from workers.modelcache.resident import is_resident, resident_share

MIB = 1 << 20


def test_written_files_are_resident_until_they_are_dropped(tmp_path: Path) -> None:
    version = tmp_path / "v"
    version.mkdir()
    assert not is_resident(version), "nothing to load is nothing at hand"
    weights = version / "model.safetensors"
    weights.write_bytes(os.urandom(9 * MIB + 5))
    assert resident_share(weights) == 1.0 and is_resident(version)
    with weights.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_share(weights) > 0.5:  # a file system that is memory itself keeps them, rightly
        assert os.statvfs(tmp_path).f_bsize > 0
    else:
        assert not is_resident(version)
        with weights.open("rb") as file:
            file.read(4 * MIB)
        assert 0 < resident_share(weights) < 1.0
        assert not is_resident(version), "looking has read nothing"
    (version / "two.safetensors").write_bytes(b"")
    assert not is_resident(version)
    assert resident_share(tmp_path / "absent") == 0.0
