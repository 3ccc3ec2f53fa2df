"""A container's limits, planted as the kernel's files."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from localr1.cgroup import MemoryLimit, available_memory, cpu_quota, memory_limit

GIB = 1 << 30


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_in_a_container(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 7\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    file = root / "sys/fs/cgroup/memory.max"
    assert memory_limit(root) == MemoryLimit(8 * GIB, 2 * GIB, str(file))
    assert cpu_quota(root) == 1.5


def test_what_may_still_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{8 * GIB}\n",
        "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
    }
    memory = SimpleNamespace(available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert available_memory(tmp_path / "nothing") == 20 * GIB
    root = plant(tmp_path, files)
    assert available_memory(root) == 5 * GIB
    memory.available = GIB
    assert available_memory(root) == GIB
    memory.available = 20 * GIB
    (root / "sys/fs/cgroup/memory.current").write_text(f"{9 * GIB}\n")
    assert available_memory(root) == 0


def test_the_tightest_group_above_decides(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/session\n",
            "sys/fs/cgroup/user.slice/session/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/session/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user.slice/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/memory.max": f"{6 * GIB}\n",
        },
    )
    limit = memory_limit(root)
    assert limit is not None
    assert limit.limit == 4 * GIB
    assert limit.file.endswith(str(Path("user.slice", "memory.max")))
    assert cpu_quota(root) == 3.0


def test_version_1(tmp_path: Path) -> None:
    """The paths are those outside the container, which has its own group at the top."""
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\n"
            f"total_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    limit = memory_limit(root)
    assert limit is not None
    assert (limit.limit, limit.used) == (2 * GIB, GIB // 2)
    assert cpu_quota(root) == 0.5


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": ""},
        {"proc/self/cgroup": "no colons here\n::\n0::"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "-5 cats"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": ""},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0"},
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000"},
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    ],
)
def test_no_limit(tmp_path: Path, files: dict[str, str]) -> None:
    plant(tmp_path, files)
    assert memory_limit(tmp_path) is None
    assert cpu_quota(tmp_path) is None


def test_a_group_outside_the_view_is_looked_for_at_the_top(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../other\n",
            "sys/fs/cgroup/memory.max": f"{GIB}\n",
            "sys/fs/memory.max": "5\n",
        },
    )
    limit = memory_limit(root)
    assert limit is not None
    assert limit.limit == GIB
