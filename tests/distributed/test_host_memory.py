"""How much memory a process may still take, by the machine and by its control groups."""

from pathlib import Path

import pytest

from llm.distributed import host_memory

GB = 1 << 30


def test_the_least_of_machine_and_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine = host_memory.available()
    assert 0 < on_machine < float("inf")
    above, own, old = tmp_path / "above", tmp_path / "above/own", tmp_path / "v1"
    for group in (own, old):
        group.mkdir(parents=True)
    for name, value in {"memory.max": GB // 2, "memory.current": GB // 4}.items():
        (above / name).write_text(f"{value}\n")
    (above / "memory.stat").write_text(f"anon 17\ninactive_file {GB // 8}\n")
    (own / "memory.max").write_text("max\n")
    (own / "memory.current").write_text("12345\n")
    monkeypatch.setattr(host_memory, "control_groups", lambda controller: [own, above])
    assert host_memory.available() == min(on_machine, GB // 2 - GB // 4 + GB // 8)
    (old / "memory.limit_in_bytes").write_text(f"{1 << 20}\n")
    (old / "memory.usage_in_bytes").write_text(f"{1 << 19}\n")
    monkeypatch.setattr(host_memory, "control_groups", lambda controller: [own, above, old])
    assert host_memory.available() == 1 << 19
    fields = host_memory._fields  # this process may have held more before
    monkeypatch.setattr(host_memory, "_fields", lambda path: {} if path.parts[-2] == "self" else fields(path))
    assert host_memory.has_room(100_000) and not host_memory.has_room(600_000)


def test_a_copy_leaves_room_for_the_peak_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """So much the process held at its peak, which the next step takes again."""
    fields = {"/proc/self/status": {"VmHWM": 3 << 20, "VmRSS": 1 << 20}, "/proc/meminfo": {"MemAvailable": 4 << 20}}
    monkeypatch.setattr(host_memory, "_fields", lambda path: fields.get(str(path), {}))
    assert host_memory.has_room(int(1.8 * GB)) and not host_memory.has_room(2 * GB)
    assert not host_memory.has_room(GB // 10, processes=2)


def test_a_system_that_does_not_tell_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_fields", lambda path: {})
    monkeypatch.setattr(host_memory, "control_groups", lambda controller: [])
    assert host_memory.has_room(10**15)
